"""What the optimizer's state costs, for the ledger: bytes per parameter, against AdamW, and ranks of factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..parallel.tensor import local

ADAMW_BYTES = 8
"""Of a parameter, in two fp32 moments."""


@dataclass(frozen=True)
class OptimizerState:
    """State on one rank, or summed over ranks."""

    num_bytes: int
    parameters: int
    """Numbers in the parameters that have state."""
    matrices: int = 0
    """Matrices whose second moment is factored (Adapprox), experts one by one."""
    ranks: int = 0
    """Sum of their ranks."""

    def numbers(self) -> dict[str, float]:
        """In the words of metrics.jsonl."""
        known: dict[str, float] = {"optimizer_bytes": self.num_bytes}
        if self.parameters:
            known["optimizer_bytes_per_parameter"] = self.num_bytes / self.parameters
            known["optimizer_part_of_adamw"] = self.num_bytes / self.parameters / ADAMW_BYTES
        if self.matrices:
            known["optimizer_mean_rank"] = self.ranks / self.matrices
        return known


def measure(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The state of `optimizer` on this rank; waits for the device where it holds ranks."""
    held = [(parameter, state) for parameter, state in optimizer.state.items() if state]
    ranks = [rank for _, state in held if "Q" in state for rank in local(state["rank"]).reshape(-1).tolist()]
    return OptimizerState(
        num_bytes=state_bytes(optimizer),
        parameters=sum(local(parameter).numel() for parameter, _ in held),
        matrices=len(ranks),
        ranks=sum(ranks),
    )


def in_all(states: Sequence[OptimizerState]) -> OptimizerState:
    """The sum over ranks: what several of them hold counts as often."""
    return OptimizerState(*map(sum, zip(*map(astuple, states), strict=True)))


def by_parameter(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Rank, error, bytes and seconds of each parameter, of an optimizer that reports them (Adapprox)."""
    report = getattr(optimizer, "report", None)
    return [] if report is None else [asdict(each) for each in report()]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors that `optimizer` keeps, also inside quantized ones and projectors."""
    return sum(_bytes(value) for state in optimizer.state.values() for value in state.values())


def _bytes(value: Any) -> int:
    if is_traceable_wrapper_subclass(value):
        parts, _ = value.__tensor_flatten__()
        return sum(_bytes(getattr(value, part)) for part in parts)
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(part) for part in getattr(value, "__dict__", {}).values() if isinstance(part, Tensor))
