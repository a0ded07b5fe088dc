"""Weighted gather-reduce of expert outputs; both directions gather, so the order of every sum is fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch.vectorised import gather_rows, sum_rows


def weight_of_row(weights_TK: Tensor, position_TK: Tensor, num_rows: int) -> Tensor:
    """The combine weight that goes with each row [R]; 0 for rows without a token."""
    out = weights_TK.new_zeros(num_rows + 1)
    index = torch.where(position_TK < 0, num_rows, position_TK)  # dropped choices write to the spare last cell
    return out.scatter_(0, index.reshape(-1), weights_TK.reshape(-1))[:num_rows]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, weights_TK, position_TK, source_R, may_be_empty):
        ctx.save_for_backward(rows_RD, weights_TK, position_TK, source_R)
        ctx.may_be_empty = may_be_empty
        return sum_rows(rows_RD, position_TK, may_be_empty, weights_TK)

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
        weight_R1 = weight_of_row(weights_TK, position_TK, rows_RD.size(0)).unsqueeze(-1)
        if weight_R1.dtype == grad_TD.dtype or grad_TD.device.type != "cpu":
            grad_rows = grad_of_row_RD.mul_(weight_R1)
        else:
            # Products of mixed dtypes are slow on CPU.
            grad_rows = sum_rows(grad_TD, source_R.unsqueeze(-1), ctx.may_be_empty, weight_R1)
        return grad_rows, grad_weights, None, None, None


def combine(
    rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor, may_be_empty: bool = True
) -> Tensor:
    """As `naive.combine`; `may_be_empty=False` promises that nothing was dropped and no row is padding."""
    return _Combine.apply(rows_RD, weights_TK, position_TK, source_R, may_be_empty)  # pyright: ignore[reportReturnType]
