"""The memory that a contender takes, counted the same way for every one: by storage, not by process.

saved_for_backward   what autograd keeps
peak_bytes           the most that lived at once
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

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
    torch take for themselves.
    """
    with cpu_profile(memory=True) as trace:
        work()
    # The events alone know when; no public view of them has the allocations.
    recorded: Any = trace.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))
