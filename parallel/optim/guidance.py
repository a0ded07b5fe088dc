"""Longer steps where the update agrees with the first moment, shorter ones where it does not (METHODS A4)."""

from __future__ import annotations

from torch import Tensor


def guidance(dot_b: Tensor, update2_b: Tensor, average2_b: Tensor, eps: float) -> Tensor:
    """What a step is multiplied by, between a half and 2: 1 / (1 - cos(M^, M) + eps).

    dot_b, update2_b, average2_b: <M^, M>, <M^, M^> and <M, M> of each matrix, M the new first moment; fp64.
    """
    cos_b = dot_b / (update2_b * average2_b).sqrt().clamp(min=1e-300)
    return (1 / (1 - cos_b + eps).clamp(min=1e-300)).clamp(0.5, 2)
