"""Reference of combine weights (METHODS R4, R6), from log scores so that underflow needs no eps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..route.naive import Score


def weigh(
    logits_TE: Tensor,
    experts_TK: Tensor,
    times_TK: Tensor,
    score: Score,
    normalize: bool,
    detach: bool,
    always_counted: int,
) -> Tensor:
    """w_k = t_k p_k / sum of t_j p_j over j, 0 where t_k is 0; for K = 1 exactly 1 with the gradient of p.

    Lost choices among the first `always_counted` count once in the sum.
    """
    chosen_TK = logits_TE.gather(1, experts_TK)
    if score == "sigmoid":
        log_p_TK = F.logsigmoid(chosen_TK)
    else:
        log_p_TK = chosen_TK - logits_TE.logsumexp(-1, keepdim=True)
    there_TK, K = times_TK > 0, times_TK.size(1)
    if normalize and K == 1:
        p_TK = log_p_TK.exp()
        return (p_TK - p_TK.detach() + 1).masked_fill(~there_TK, 0)
    log_w_TK = log_p_TK + times_TK.clamp(min=1).to(log_p_TK.dtype).log()
    if normalize:
        counted_TK = there_TK | (torch.arange(K, device=times_TK.device) < always_counted)
        summed_TK = log_w_TK.detach() if detach else log_w_TK
        total_T1 = summed_TK.masked_fill(~counted_TK, -torch.inf).logsumexp(-1, keepdim=True)
        # Nobody is there: any finite value will do, the row is zeros.
        log_w_TK = log_w_TK - total_T1.masked_fill(total_T1.isinf(), 0)
    # Before exp: a lost choice may be any number of times as probable as those that survived.
    return log_w_TK.masked_fill(~there_TK, -torch.inf).exp()
