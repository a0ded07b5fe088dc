"""What a pass over V does beside its product."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What is done with weights while V^T is multiplied."""

    clip_b: Tensor
    """fp32; what each matrix's update is multiplied by."""
    weigh_new: float
    """1 - beta1."""
    decay: float
    """What weights are multiplied by first."""
    step_size: float
    """Times the first moment."""
