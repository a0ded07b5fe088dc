"""The combine weight of each choice of a token (METHODS R4, R6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, implementation
from ..route import Score
from . import naive, vectorised

__all__ = ["weigh"]


def weigh(
    logits_TE: Tensor,
    experts_TK: Tensor,
    times_TK: Tensor | None = None,
    score: Score = "softmax",
    normalize: bool = True,
    detach: bool = True,
    always_counted: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Weights [T, K] of `experts_TK`, differentiable in the logits; 0 where a choice has no expert to serve it.

    Args:
        logits_TE: the gate's, fp32 or wider.
        experts_TK: int64, K different experts per token.
        times_TK: int64, how many routes each of them serves: 0 where the choice was lost, more than 1 for a stand-in;
            None: one each.
        score: what makes p of the logits: softmax over all experts, or the sigmoid.
        normalize: divides by the sum of times * p; for K = 1 the weight is exactly 1, with the gradient of p.
        detach: that sum passes no gradient.
        always_counted: lost choices of a lower rank than this count once in the sum.
    """
    found = implementation(backend, logits_TE.device)
    if found == "torch":
        return vectorised.weigh(logits_TE, experts_TK, times_TK, score, normalize, detach, always_counted)
    if found == "triton":
        from . import kernel

        return kernel.weigh(logits_TE, experts_TK, times_TK, score, normalize, detach, always_counted)
    if times_TK is None:
        times_TK = torch.ones_like(experts_TK)
    return naive.weigh(logits_TE, experts_TK, times_TK, score, normalize, detach, always_counted)
