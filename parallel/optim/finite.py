"""Gradients that no step can be made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .factors import wide


def are_too_large(grads: list[Tensor], device: torch.device) -> Tensor:
    """1 for each with an entry that is NaN or infinite, or whose square is, else 0; before them one more 0.

    A rank may have no gradient and still be asked.
    """
    nothing = torch.zeros((), device=device)
    there = [grad for grad in grads if grad.numel()]
    if device.type == "cpu":
        # Twenty times as fast as the norm.
        found = iter([torch.stack(torch.aminmax(grad)).abs_().amax() for grad in there])
    else:
        found = iter(torch._foreach_norm(there, math.inf) if there else [])  # pyright: ignore[reportPrivateImportUsage]
    tops = [next(found).to(device, wide(grad.dtype)) if grad.numel() else nothing for grad in grads]
    if len({top.dtype for top in tops}) > 1:
        # What is infinite in its own dtype stays so.
        return (~torch.stack([nothing, *(top.square() for top in tops)]).isfinite()).float()
    return (~torch.stack([torch.zeros_like(tops[0]) if tops else nothing, *tops]).square().isfinite()).float()


def not_finite(names: Sequence[str], done: str = "") -> FloatingPointError:
    """The error that names these parameters, and what was `done`; without names they are another rank's."""
    return FloatingPointError(
        f"NaN or infinite gradient of {few(names) or 'a parameter on another rank'};{done} lower the learning rate, or "
        f"leave such steps out by nonfinite='skip'"
    )


def few(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
