"""Reference of the second moment: the whole matrix, as the equation has it."""

from __future__ import annotations

import torch
from torch import Tensor


def second_moment(q_bmk: Tensor, u_bnk: Tensor, grad_bmn: Tensor, beta2: float, clamp: bool = True) -> Tensor:
    """V = beta2 * max(Q U^T, 0) + (1 - beta2) * G^2, [b, m, n].

    Without `clamp` the product keeps its negative entries.
    """
    product_bmn = torch.bmm(q_bmk, u_bnk.transpose(1, 2))
    if clamp:
        product_bmn = product_bmn.clamp(min=0)
    return beta2 * product_bmn + (1 - beta2) * grad_bmn.square()
