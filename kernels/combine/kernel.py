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
from ..tiles import accumulator, dense_rows, grid_of, row_tile


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
    grad_stride,
    row_stride,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_rows[position[t, k]] = weights[t, k] * grad[t]; grad_weights[t, k] = grad[t] . rows[position[t, k]].

    Neighbouring programs share a token: its gradient comes from the cache for all but the first.
    """
    choice = tl.program_id(0).to(tl.int64)
    token = choice // K
    row = tl.load(position_ptr + choice)
    weight = tl.load(weights_ptr + choice).to(ACC)
    col = tl.arange(0, BLOCK_D)
    dots = tl.zeros([BLOCK_D], ACC)
    for start in range(0, D, BLOCK_D):
        at = start + col
        mask = (at < D) & (row >= 0)
        grad = tl.load(grad_ptr + token * grad_stride + at, mask=mask, other=0.0).to(ACC)
        value = tl.load(rows_ptr + row * row_stride + at, mask=mask, other=0.0).to(ACC)
        tl.store(grad_rows_ptr + row * D + at, (weight * grad).to(grad_rows_ptr.dtype.element_ty), mask=mask)
        dots += grad * value
    tl.store(grad_weights_ptr + choice, tl.sum(dots, 0).to(grad_weights_ptr.dtype.element_ty))


@triton.jit
def clear_padding(
    out_ptr,  # [R, D]
    source_ptr,  # int64 [R]
    D,
    BLOCK_D: tl.constexpr,
):
    """Zeros the rows without a token; the others are left alone, not even read."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(source_ptr + row) < 0:
        col = tl.arange(0, BLOCK_D)
        for start in range(0, D, BLOCK_D):
            at = start + col
            tl.store(out_ptr + row * D + at, tl.zeros([BLOCK_D], out_ptr.dtype.element_ty), mask=at < D)


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
    grad_TD: Tensor, rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [R, D], zero in those without a token, and of the weights [T, K]."""
    D = rows_RD.size(1)
    grad_RD, grad_TK = torch.empty_like(rows_RD, memory_format=torch.contiguous_format), torch.empty_like(weights_TK)
    tile = row_tile(D)
    if grad_TK.numel():
        grad_TD, rows_RD, weights_TK = dense_rows(grad_TD), dense_rows(rows_RD), weights_TK.contiguous()
        launch(combine_bwd, (grad_TK.numel(),),
            grad_TD, rows_RD, weights_TK, position_TK.contiguous(), grad_RD, grad_TK,
            D, grad_TD.stride(0), rows_RD.stride(0),
            K=position_TK.size(1), ACC=accumulator(rows_RD, weights_TK), BLOCK_D=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    clear(grad_RD, source_R)
    return grad_RD, grad_TK


def clear(rows_RD: Tensor, source_R: Tensor) -> None:
    """Zeros the rows whose source is below 0, in place."""
    if rows_RD.numel():
        tile = row_tile(rows_RD.size(1))
        launch(
            clear_padding,
            (rows_RD.size(0),),
            rows_RD,
            source_R.contiguous(),
            rows_RD.size(1),
            BLOCK_D=tile.block,
            num_warps=tile.warps,
        )


@torch.library.custom_op("wastenot::combine", mutates_args=())
def _combine(rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor) -> Tensor:
    return sum_rows(rows_RD, weights_TK, position_TK)


@_combine.register_fake
def _(rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor) -> Tensor:
    return rows_RD.new_empty(position_TK.size(0), rows_RD.size(1))


@torch.library.custom_op("wastenot::combine_backward", mutates_args=())
def _combine_backward(
    grad_TD: Tensor, rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor
) -> tuple[Tensor, Tensor]:
    return differentiate(grad_TD, rows_RD, weights_TK, position_TK, source_R)


@_combine_backward.register_fake
def _(grad_TD, rows_RD, weights_TK, position_TK, source_R):
    return torch.empty_like(rows_RD, memory_format=torch.contiguous_format), torch.empty_like(weights_TK)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_TD: Tensor):
    return *_combine_backward(grad_TD, *ctx.saved_tensors), None, None


_combine.register_autograd(_backward, setup_context=_save)


def combine(rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor) -> Tensor:
    """As `naive.combine`; differentiable once, in rows and weights."""
    return _combine(rows_RD, weights_TK, position_TK, source_R)
