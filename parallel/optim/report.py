"""What Adapprox holds of each parameter: rank, error, bytes and time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import wide
from .shards import local


@dataclass(frozen=True)
class ParameterReport:
    """One parameter's state on this rank."""

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    """Of each matrix; empty where the second moment is whole."""
    xi: tuple[float, ...]
    """Relative error of the last factors against the moment they were made of; it understates that of the average."""
    true_xi: tuple[float, ...]
    """The same against the true average of squares, at the last search for the rank; empty without `true_error`."""
    allocated_bytes: int
    logical_bytes: int
    """With each matrix of a stack at its own rank instead of the largest."""
    adamw_bytes: int
    """What AdamW would hold of this rank's part."""
    seconds: float
    """Spent on it in all steps so far; on a GPU, on starting its work."""


def report_of(name: str, parameter: Tensor, state: dict[str, Tensor], seconds: float) -> ParameterReport:
    """The state of `parameter` by numbers."""
    part = local(parameter)
    allocated = state_bytes(state.values())
    ranks: tuple[int, ...] = ()
    xi: tuple[float, ...] = ()
    true_xi: tuple[float, ...] = ()
    logical = allocated
    if "Q" in state:
        ranks = tuple(int(rank) for rank in local(state["rank"]).reshape(-1).tolist())
        xi = tuple(local(state["xi"]).reshape(-1).tolist())
        if "true_xi" in state:
            true_xi = tuple(local(state["true_xi"]).reshape(-1).tolist())
        q, u = local(state["Q"]), local(state["U"])
        spare = len(ranks) * q.size(-1) - sum(ranks)
        logical -= spare * (q.size(-2) + u.size(-2)) * q.element_size()
    element = torch.empty((), dtype=wide(part.dtype)).element_size()
    return ParameterReport(
        name=name,
        shape=tuple(parameter.shape),
        ranks=ranks,
        xi=xi,
        true_xi=true_xi,
        allocated_bytes=allocated,
        logical_bytes=logical,
        adamw_bytes=2 * part.numel() * element,
        seconds=seconds,
    )


def state_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts of `tensors`, 0-d ones left out: those count steps."""
    return sum(part.numel() * part.element_size() for tensor in tensors if (part := local(tensor)).dim() > 0)
