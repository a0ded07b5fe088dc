"""The most memory that lived at once during some work, counted by allocation: on CPUs and GPUs alike."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType

from ..parallel.tensor import local
from .optimizer_state import state_bytes
from .profiling import cpu_profile


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind this rank's parts of `tensors`, each once."""
    parts = [local(tensor.detach()) for tensor in tensors]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of this rank's weights, buffers, gradients and optimizer state: what is there between steps."""
    gradients = (each.grad for each in model.parameters() if each.grad is not None)
    return storage_bytes([*model.parameters(), *model.buffers()]) + storage_bytes(gradients) + state_bytes(optimizer)


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
