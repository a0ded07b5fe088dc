"""Which experts a rank holds."""

from __future__ import annotations

from torch import nn

from .mesh import Axis

EXPERT_PARAMETERS = "expert_parameters"
"""Name of the attribute by which a module lists its parameters with a leading expert dimension."""

HOLD = "hold"
"""Name of such a module's method that calls a function during which its weights are whole (moe/experts.py)."""


def local_experts(num_experts: int, axis: Axis) -> range:
    """Experts of this rank: consecutive, as many on every rank. Raises ValueError where they do not divide."""
    if num_experts % axis.size:
        raise ValueError(f"experts: {num_experts} cannot be shared by {axis.size} ranks; use a multiple of {axis.size}")
    share = num_experts // axis.size
    return range(axis.rank * share, (axis.rank + 1) * share)


def expert_parameter_names(model: nn.Module) -> frozenset[str]:
    """Full names of all parameters whose leading dimension is the experts of this rank."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, EXPERT_PARAMETERS, ())
    )
