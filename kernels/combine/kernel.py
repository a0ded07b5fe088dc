"""Weighted gather-reduce of expert outputs in Triton: one read of every row, one write of every token.

Both directions gather, none uses an atomic, and a program's sums run in the order of k and of D: the bits of a result
depend on shapes and dtypes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from ..operator import operator
from ..tiles import accumulator, dense_rows, grid_of, pieces, power_of_two, row_tile

_CLEARED = 16
"""Rows that a program of `clear_padding` looks at."""


@triton.jit
def combine_fwd(
    rows_ptr,  # [R, D]
    weights_ptr,  # [T, K], or anything where not WEIGHTED
    position_ptr,  # int64 [T, K]
    y_ptr,  # [T, D]
    D,
    row_stride,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y[t] = sum over k of weights[t, k] * rows[position[t, k]], positions below 0 left out."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = col < D
    total = tl.zeros([BLOCK_D], ACC)
    for k in tl.static_range(K):
        row = tl.load(position_ptr + token * K + k)
        # A row that is not there is not read: whatever lies in its place cannot leak in.
        part = tl.load(rows_ptr + row * row_stride + col, mask=inside & (row >= 0), other=0.0).to(ACC)
        if WEIGHTED:
            part *= tl.load(weights_ptr + token * K + k).to(ACC)
            # A weight that is not finite stays out too.
            part = tl.where(row >= 0, part, 0.0)
        total += part
    tl.store(y_ptr + token * D + col, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine_bwd(
    grad_ptr,  # [T, D]
    rows_ptr,  # [R, D]
    weights_ptr,  # [T, K]
    position_ptr,  # int64 [T, K]
    grad_rows_ptr,  # [R, D]
    grad_weights_ptr,  # [T, K]
    D,
    K,
    grad_stride,
    row_stride,
    ACC: tl.constexpr,
    PAD_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
):
    """grad_rows[position[t, k]] = weights[t, k] * grad[t]; grad_weights[t, k] = grad[t] . rows[position[t, k]].

    One program a token: its gradient is read once, and its K rows are on their way together.
    """
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, PAD_K)
    row = tl.load(position_ptr + token * K + choice, mask=choice < K, other=-1)[:, None]  # [PAD_K, 1]
    weight = tl.load(weights_ptr + token * K + choice, mask=choice < K, other=0.0)[:, None].to(ACC)
    col = tl.arange(0, BLOCK_D)
    dots = tl.zeros([PAD_K, BLOCK_D // PART], ACC)
    for start in range(0, D, BLOCK_D):
        at = start + col
        grad = tl.load(grad_ptr + token * grad_stride + at, mask=at < D, other=0.0)[None, :].to(ACC)  # [1, BLOCK_D]
        mask = (at < D)[None, :] & (row >= 0)
        value = tl.load(rows_ptr + row * row_stride + at[None, :], mask=mask, other=0.0).to(ACC)  # [PAD_K, BLOCK_D]
        grad_row = (weight * grad).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + row * D + at[None, :], grad_row, mask=mask)
        # A gradient that is not finite stays out of lost choices too.
        products = tl.where(mask, grad * value, 0.0)
        # What lies in one thread is summed at once: a thread has no registers for as many sums as values.
        dots += tl.sum(tl.reshape(products, (PAD_K, BLOCK_D // PART, PART)), 2)
    total = tl.sum(dots, 1).to(grad_weights_ptr.dtype.element_ty)
    tl.store(grad_weights_ptr + token * K + choice, total, mask=choice < K)


@triton.jit
def clear_padding(
    out_ptr,  # [R, D]
    source_ptr,  # int64 [R]
    R,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zeros the rows without a token; the others are left alone, not even read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # In most programs every row has a token.
    source = tl.load(source_ptr + row, mask=row < R, other=0)
    if tl.min(source, 0) < 0:
        col = tl.arange(0, BLOCK_D)
        for start in range(0, D, BLOCK_D):
            at = start + col
            nothing = tl.zeros([ROWS, BLOCK_D], out_ptr.dtype.element_ty)
            mask = (source < 0)[:, None] & (at < D)[None, :]
            tl.store(out_ptr + row[:, None] * D + at[None, :], nothing, mask=mask)


def sum_rows(rows_RD: Tensor, weights_TK: Tensor | None, position_TK: Tensor) -> Tensor:
    """y_t = sum over k of weights_TK[t, k] (or 1) * rows_RD[position_TK[t, k]]; [T, D] in the dtype of the rows."""
    T, K = position_TK.shape
    D = rows_RD.size(1)
    y_TD = rows_RD.new_empty(T, D)
    if y_TD.numel() == 0:
        return y_TD
    tile, rows_RD = row_tile(D), dense_rows(rows_RD)
    weights = rows_RD if weights_TK is None else weights_TK.contiguous()
    launch(combine_fwd, grid_of(T, D, tile),
        rows_RD, weights, position_TK.contiguous(), y_TD, D, rows_RD.stride(0),
        K=K, WEIGHTED=weights_TK is not None, ACC=accumulator(rows_RD, weights), BLOCK_D=tile.block,
        num_warps=tile.warps,
    )  # fmt: skip
    return y_TD


def differentiate(
    grad_TD: Tensor, rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor, may_be_empty: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [R, D], zero in those without a token, and of the weights [T, K]."""
    (T, K), D = weights_TK.shape, rows_RD.size(1)
    grad_RD, grad_TK = torch.empty_like(rows_RD, memory_format=torch.contiguous_format), torch.empty_like(weights_TK)
    if grad_TK.numel():
        grad_TD, rows_RD, weights_TK = dense_rows(grad_TD), dense_rows(rows_RD), weights_TK.contiguous()
        pad_k = power_of_two(K)
        # 32 values a thread: in bf16 four loads of 16 bytes, on their way together.
        block = min(power_of_two(D), max(16, 4096 // pad_k), 1024)
        launch(combine_bwd, (T,),
            grad_TD, rows_RD, weights_TK, position_TK.contiguous(), grad_RD, grad_TK,
            D, K, grad_TD.stride(0), rows_RD.stride(0),
            ACC=accumulator(rows_RD, weights_TK), PAD_K=pad_k, BLOCK_D=block, PART=min(8, block),
            num_warps=1 if pad_k * block <= 1024 else 4,
        )  # fmt: skip
    if may_be_empty:
        clear(grad_RD, source_R)
    return grad_RD, grad_TK


def clear(rows_RD: Tensor, source_R: Tensor) -> None:
    """Zeros the rows whose source is below 0, in place."""
    R, D = rows_RD.shape
    if rows_RD.numel():
        tile = row_tile(D)
        launch(clear_padding, (pieces(R, _CLEARED),),
            rows_RD, source_R.contiguous(), R, D, ROWS=_CLEARED, BLOCK_D=tile.block, num_warps=tile.warps,
        )  # fmt: skip


def _forward(rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor, may_be_empty: bool) -> Tensor:
    return sum_rows(rows_RD, weights_TK, position_TK)


def _forward_fake(rows_RD, weights_TK, position_TK, source_R, may_be_empty):
    return rows_RD.new_empty(position_TK.size(0), rows_RD.size(1))


def _differentiate_fake(grad_TD, rows_RD, weights_TK, position_TK, source_R, may_be_empty):
    return torch.empty_like(rows_RD, memory_format=torch.contiguous_format), torch.empty_like(weights_TK)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.may_be_empty = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_TD: Tensor):
    return *_combine_backward(grad_TD, *ctx.saved_tensors, ctx.may_be_empty), None, None, None


_combine_backward = operator("combine_backward", differentiate, _differentiate_fake)
_combine = operator("combine", _forward, _forward_fake, _save, _backward)


def combine(
    rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor, may_be_empty: bool = True
) -> Tensor:
    """As `naive.combine`; differentiable once, in rows and weights. `may_be_empty=False`: no source is -1."""
    return _combine(rows_RD, weights_TK, position_TK, source_R, may_be_empty)
