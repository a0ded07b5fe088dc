"""Combine weights where nothing was lost: a softmax over the chosen logits, without the sum over all experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..route.naive import Score
from . import naive


def weigh(
    logits_TE: Tensor,
    experts_TK: Tensor,
    times_TK: Tensor | None,
    score: Score,
    normalize: bool,
    detach: bool,
    always_counted: int,
) -> Tensor:
    """As `naive.weigh`; without `times_TK` every choice serves one route."""
    if times_TK is None:
        if normalize and not detach and score == "softmax" and experts_TK.size(1) > 1:
            # The sum over all experts is in every p, and cancels.
            return logits_TE.gather(1, experts_TK).softmax(-1)
        times_TK = torch.ones_like(experts_TK)
    return naive.weigh(logits_TE, experts_TK, times_TK, score, normalize, detach, always_counted)
