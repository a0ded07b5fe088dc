"""Combine weights of a token's experts (METHODS R4, R6), from log scores so that underflow needs no eps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import RouterConfig


def log_scores(logits_TE: Tensor, experts_TK: Tensor, score: str) -> Tensor:
    """log p of the chosen experts, [T, K], with gradient; p is the softmax over all experts, or the sigmoid."""
    chosen_TK = logits_TE.gather(1, experts_TK)
    if score == "sigmoid":
        return F.logsigmoid(chosen_TK)
    return chosen_TK - logits_TE.logsumexp(-1, keepdim=True)


def combine_weights(log_p_TK: Tensor, slots_TK: Tensor, config: RouterConfig) -> Tensor:
    """The weight of each choice, 0 where it has no slot (R4); [T, K] with gradient to `log_p_TK`.

    `normalize: survivors` divides by the sum over choices that got a slot, `top_k` adds the router's own lost
    ones. For K = 1 the result is exactly 1 with the gradient of p.
    """
    kept_TK = slots_TK >= 0
    K = slots_TK.size(1)
    if config.normalize == "none":
        weights_TK = log_p_TK.exp().masked_fill(~kept_TK, 0)
    elif K == 1:
        p_TK = log_p_TK.exp()
        weights_TK = (p_TK - p_TK.detach() + 1).masked_fill(~kept_TK, 0)
    else:
        counted_TK = kept_TK
        if config.normalize == "top_k":
            counted_TK = kept_TK | (torch.arange(K, device=kept_TK.device) < config.top_k)
        summed_TK = log_p_TK.detach() if config.detach else log_p_TK
        total_T1 = summed_TK.masked_fill(~counted_TK, -torch.inf).logsumexp(-1, keepdim=True)
        # Nobody survived: any finite value will do, the row is zeros.
        total_T1 = total_T1.masked_fill(total_T1.isinf(), 0)
        # Before exp: a lost choice may be any number of times as probable as those that survived.
        weights_TK = (log_p_TK - total_T1).masked_fill(~kept_TK, -torch.inf).exp()
    return scaled(weights_TK, config)


def stand_in_weights(
    log_p_TK: Tensor, log_local_T: Tensor, slots_TK: Tensor, lost_T: Tensor, config: RouterConfig
) -> tuple[Tensor, Tensor]:
    """Weights of the choices [T, K] and of the stand-in [T] of tokens whose `lost_T` >= 1 routes it stands for (R6).

    Every route is taken again, so `normalize: survivors` and `top_k` divide by the same sum. Values for tokens
    that lost nothing are finite and mean nothing.
    """
    kept_TK = slots_TK >= 0
    log_stand_in_T1 = (log_local_T + lost_T.clamp(min=1).to(log_p_TK.dtype).log()).unsqueeze(1)
    if config.normalize == "none":
        total_T1 = torch.zeros_like(log_stand_in_T1)
    else:
        log_all_TL = torch.cat([log_p_TK.masked_fill(~kept_TK, -torch.inf), log_stand_in_T1], 1)
        total_T1 = (log_all_TL.detach() if config.detach else log_all_TL).logsumexp(1, True)
    weights_TK = (log_p_TK - total_T1).masked_fill(~kept_TK, -torch.inf).exp()
    return scaled(weights_TK, config), scaled((log_stand_in_T1 - total_T1).exp().squeeze(1), config)


def scaled(weights: Tensor, config: RouterConfig) -> Tensor:
    """`weights` times `config.scale`."""
    return weights if config.scale == 1 else weights * config.scale
