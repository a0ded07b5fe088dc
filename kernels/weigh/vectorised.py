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
        if normalize and score == "softmax" and experts_TK.size(1) > 1:
            chosen_TK = logits_TE.gather(1, experts_TK)
            # The sum over all experts is in every p, and cancels; where no gradient may pass the sum over choices, the
            # gradient of p is left.
            if not detach:
                return chosen_TK.softmax(-1)
            total_T1 = logits_TE.logsumexp(-1, keepdim=True)
            part_T1 = chosen_TK.detach().logsumexp(-1, keepdim=True)
            return (chosen_TK - (total_T1 + (part_T1 - total_T1.detach()))).exp()
        times_TK = torch.ones_like(experts_TK)
    return naive.weigh(logits_TE, experts_TK, times_TK, score, normalize, detach, always_counted)
