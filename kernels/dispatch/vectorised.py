"""Permutation of tokens into rows whose backward gathers too: deterministic, no scatter-add."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 2**18
"""Elements."""


def gather_rows(rows_RD: Tensor, index: Tensor, may_be_empty: bool) -> Tensor:
    """rows_RD at `index` (any shape, flattened), zero where the index is -1 (only if `may_be_empty`)."""
    flat = index.reshape(-1)
    if not may_be_empty:
        return rows_RD.index_select(0, flat)
    if rows_RD.device.type != "cpu" and rows_RD.size(0):
        return rows_RD.index_select(0, flat.clamp(min=0)).masked_fill_((flat < 0).unsqueeze(-1), 0)
    # A spare last row of zeros: on CPU a fifth of the time of masking what was gathered.
    spare_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.size(1))])
    return spare_RD.index_select(0, torch.where(flat < 0, rows_RD.size(0), flat))


def sum_rows(rows_RD: Tensor, index_TK: Tensor, may_be_empty: bool, weights_TK: Tensor | None = None) -> Tensor:
    """y_t = sum over k of weights_TK[t, k] (or 1) * rows_RD[index_TK[t, k]], indices of -1 left out; [T, D].

    Sums run in the order of k and in the wider of both dtypes; the result has that of the rows.
    """
    (T, K), D = index_TK.shape, rows_RD.size(1)
    if K == 1 and weights_TK is None:
        return gather_rows(rows_RD, index_TK, may_be_empty)
    # A bag sums in fp32 at least; to leave choices out of it takes their number, which a traced tensor does not have.
    wider = weights_TK is not None and weights_TK.dtype == torch.float64 != rows_RD.dtype
    if rows_RD.device.type != "cpu" or wider or (may_be_empty and type(index_TK) is not Tensor):
        gathered_TKD = gather_rows(rows_RD, index_TK, may_be_empty).view(T, K, D)
        if weights_TK is None:
            return gathered_TKD.sum(1)
        return (gathered_TKD * weights_TK.unsqueeze(-1)).sum(1).to(rows_RD.dtype)
    # On CPU a bag reads each row once and writes each sum once: no gathered copy of K rows a token.
    # A bag takes weights in the dtype of the rows: few rows are widened, else what rounding takes off the weights goes
    # in as further entries.
    dtype = rows_RD.dtype
    if weights_TK is not None and weights_TK.dtype != dtype:
        if rows_RD.numel() <= _FEW:
            rows_RD = rows_RD.to(weights_TK.dtype)
        else:
            high_TK = weights_TK.to(dtype)
            weights_TK = torch.cat([high_TK, (weights_TK - high_TK).to(dtype)], 1)
            index_TK, K = index_TK.repeat(1, 2), 2 * K
    flat, flat_weights = index_TK.reshape(-1), None if weights_TK is None else weights_TK.reshape(-1)
    ends = torch.arange(0, T * K + 1, K)
    if may_be_empty:
        there_TK = index_TK >= 0
        ends[1:] = there_TK.sum(1).cumsum(0)
        there = there_TK.reshape(-1)
        flat, flat_weights = flat[there], None if flat_weights is None else flat_weights[there]
    summed_TD = torch.embedding_bag(rows_RD, flat, ends, False, 0, False, flat_weights, include_last_offset=True)[0]
    return summed_TD.to(dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, source_R: Tensor, position_TK: Tensor, may_be_empty: bool) -> Tensor:
        ctx.save_for_backward(position_TK)
        ctx.may_be_empty = may_be_empty
        return gather_rows(x_TD, source_R, may_be_empty)

    @staticmethod
    def backward(ctx, *grads):
        (grad_RD,) = grads
        (position_TK,) = ctx.saved_tensors
        # Also a dropped choice has no row, so position may be -1 where source is never.
        may_be_empty = ctx.may_be_empty or position_TK.numel() != grad_RD.size(0)
        return sum_rows(grad_RD, position_TK, may_be_empty), None, None, None


def permute(x_TD: Tensor, source_R: Tensor, position_TK: Tensor, may_be_empty: bool = True) -> Tensor:
    """As `naive.permute`; `may_be_empty=False` promises that no source is -1."""
    return _Permute.apply(x_TD, source_R, position_TK, may_be_empty)  # pyright: ignore[reportReturnType]


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return rows_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx, *grads):
        (inverse_R,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_R), None, None


def reorder(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """As `naive.reorder`."""
    return _Reorder.apply(rows_RD, order_R, inverse_R)  # pyright: ignore[reportReturnType]
