"""Reference of the weighted sum of each token's expert outputs, differentiated by autograd."""

from __future__ import annotations

from torch import Tensor


def combine(rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor) -> Tensor:
    """y_t = sum over kept choices of weights_TK[t, k] * rows_RD[position_TK[t, k]], summed in the weights' dtype."""
    T = position_TK.size(0)
    if rows_RD.size(0) == 0:
        return rows_RD.new_zeros(T, rows_RD.size(1)) + rows_RD.sum() + 0 * weights_TK.sum().to(rows_RD.dtype)
    kept_TK = position_TK >= 0
    rows_TKD = rows_RD[position_TK.clamp(min=0)].masked_fill(~kept_TK.unsqueeze(-1), 0)
    weights = weights_TK.masked_fill(~kept_TK, 0)
    return (rows_TKD.to(weights.dtype) * weights.unsqueeze(-1)).sum(1).to(rows_RD.dtype)
