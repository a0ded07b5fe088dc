"""Weighted gather-reduce of expert outputs; both directions gather, so the order of every sum is fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch.vectorised import gather_rows


def weight_of_row(weights_TK: Tensor, position_TK: Tensor, num_rows: int) -> Tensor:
    """The combine weight that goes with each row [R]; 0 for rows without a token."""
    out = weights_TK.new_zeros(num_rows + 1)
    index = torch.where(position_TK < 0, num_rows, position_TK)  # dropped choices write to the spare last cell
    return out.scatter_(0, index.reshape(-1), weights_TK.reshape(-1))[:num_rows]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, weights_TK, position_TK, source_R, may_be_empty):
        T, K = position_TK.shape
        ctx.save_for_backward(rows_RD, weights_TK, position_TK, source_R)
        ctx.may_be_empty = may_be_empty
        rows_ND = gather_rows(rows_RD, position_TK, may_be_empty)
        if K == 1:
            return rows_ND.mul_(weights_TK).to(rows_RD.dtype)
        if rows_ND.dtype == weights_TK.dtype:
            return torch.bmm(weights_TK.unsqueeze(1), rows_ND.view(T, K, -1)).squeeze(1)
        return (rows_ND.view(T, K, -1) * weights_TK.unsqueeze(-1)).sum(1).to(rows_RD.dtype)

    @staticmethod
    def backward(ctx, *grads):
        (grad_TD,) = grads
        rows_RD, weights_TK, position_TK, source_R = ctx.saved_tensors
        grad_of_row_RD = gather_rows(grad_TD, source_R, ctx.may_be_empty)
        grad_weights = None
        if ctx.needs_input_grad[1]:
            # The dot product of a row with its token's gradient, then back from row to choice.
            dots_R1 = (grad_of_row_RD * rows_RD).sum(-1, keepdim=True, dtype=weights_TK.dtype)
            grad_weights = gather_rows(dots_R1, position_TK, ctx.may_be_empty).view_as(weights_TK)
        weight_R = weight_of_row(weights_TK, position_TK, rows_RD.size(0))
        grad_rows = grad_of_row_RD.mul_(weight_R.unsqueeze(-1))
        return grad_rows, grad_weights, None, None, None


def combine(
    rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor, may_be_empty: bool = True
) -> Tensor:
    """As `naive.combine`; `may_be_empty=False` promises that nothing was dropped and no row is padding."""
    return _Combine.apply(rows_RD, weights_TK, position_TK, source_R, may_be_empty)  # pyright: ignore[reportReturnType]
