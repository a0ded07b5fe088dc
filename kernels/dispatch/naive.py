"""Reference of the permutation of tokens into rows, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def permute(x_TD: Tensor, source_R: Tensor, position_TK: Tensor) -> Tensor:
    """Row r is token source_R[r], or zero where source_R[r] is -1. `position_TK` is the inverse map."""
    empty = (source_R < 0).unsqueeze(-1)
    return torch.where(empty, torch.zeros_like(x_TD[:1]), x_TD[source_R.clamp(min=0)])


def reorder(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Row r of the result is row order_R[r]; `inverse_R` is the inverse permutation."""
    return rows_RD[order_R]
