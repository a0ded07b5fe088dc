"""The memory that a contender takes, counted the same way for every one: by storage, not by process.

saved_for_backward   what autograd keeps
peak_bytes           the most that lived at once
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType

from .profiling import cpu_profile


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps meanwhile, by address; not those of the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        # The tensor itself would hold the graph that holds it.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes alive at once during `work`, beyond those alive before it.

    Counts every allocation of torch's CPU allocator, inside operators too; not the scratch that libraries below
    torch take for themselves. Frees that torch's profiler does not report count until their memory is used again: those
    of other threads, and of what was there before `work`, which had better be freed before.
    """
    with cpu_profile(memory=True) as trace:
        work()
    # The events alone know when and where; no public view of them has the allocations.
    recorded: Any = trace.profiler
    events = _allocations(recorded.kineto_results.experimental_event_tree())
    changes = [(event.extra_fields.ptr, event.extra_fields.alloc_size) for event in events]
    return max(accumulate(actual_changes(changes), initial=0))


def actual_changes(changes: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Bytes that come and go, of (address, bytes) in order of time; bytes are negative where they are freed.

    A block where another one is believed to be says that the other one is gone.
    """
    starts: list[int] = []
    sizes: dict[int, int] = {}

    def forget(place: int) -> int:
        return sizes.pop(starts.pop(place))

    for address, size in changes:
        place = bisect_left(starts, address)
        if size < 0:
            if place < len(starts) and starts[place] == address:
                forget(place)
            yield size
            continue
        gone = 0
        if place and starts[place - 1] + sizes[starts[place - 1]] > address:
            place -= 1
            gone += forget(place)
        while place < len(starts) and starts[place] < address + size:
            gone += forget(place)
        starts.insert(place, address)
        sizes[address] = size
        yield size - gone


def _allocations(tree: list[Any]) -> list[Any]:
    """Allocations and frees among the events of `tree`, in order of time."""
    found, left = [], list(tree)
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            found.append(event)
    return sorted(found, key=lambda event: event.start_time_ns)
