"""Tokens into rows in Triton: one read of every token that a row wants, one write of every row.

A gather by rows would read each token K times, and not from the cache: its rows lie as far apart as its experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..combine.kernel import clear, sum_rows
from ..launching import launch
from ..operator import operator
from ..tiles import COPY_TILES, dense_rows, grid_of, row_tile


@triton.jit
def scatter_fwd(
    x_ptr,  # [T, D]
    position_ptr,  # int64 [T, K]
    rows_ptr,  # [R, D]
    D,
    x_stride,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows[position[t, k]] = x[t], where the position is not below 0."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    # All positions before the first store, which no load could overtake.
    last = tl.load(position_ptr + token * K)
    rows = (last,)
    for k in tl.static_range(1, K):  # pyright: ignore[reportGeneralTypeIssues]
        rows += (tl.load(position_ptr + token * K + k),)
        last = tl.maximum(last, rows[k])
    # A token without a row is not read.
    value = tl.load(x_ptr + token * x_stride + col, mask=(col < D) & (last >= 0), other=0.0)
    for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(rows_ptr + rows[k] * D + col, value, mask=(col < D) & (rows[k] >= 0))


def scatter(x_TD: Tensor, source_R: Tensor, position_TK: Tensor, may_be_empty: bool) -> Tensor:
    """Row position_TK[t, k] is x_TD[t]; rows without a token are zeros; [R, D] of any dtype."""
    R, D = source_R.numel(), x_TD.size(1)
    rows_RD = x_TD.new_empty(R, D)
    T, K = position_TK.shape
    if position_TK.numel() and rows_RD.numel():
        tile, x_TD = row_tile(D, COPY_TILES), dense_rows(x_TD)
        launch(scatter_fwd, grid_of(T, D, tile),
            x_TD, position_TK.contiguous(), rows_RD, D, x_TD.stride(0),
            K=K, BLOCK_D=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    if may_be_empty:
        clear(rows_RD, source_R)
    return rows_RD


def _scatter_fake(x_TD, source_R, position_TK, may_be_empty):
    return x_TD.new_empty(source_R.numel(), x_TD.size(1))


def _gather_sums(grad_RD: Tensor, position_TK: Tensor) -> Tensor:
    return sum_rows(grad_RD, None, position_TK)


def _gather_sums_fake(grad_RD, position_TK):
    return grad_RD.new_empty(position_TK.size(0), grad_RD.size(1))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx, grad_RD: Tensor):
    return _permute_backward(grad_RD, *ctx.saved_tensors), None, None, None


_permute_backward = operator("permute_backward", _gather_sums, _gather_sums_fake)
_permute = operator("permute", scatter, _scatter_fake, _save, _backward)


def permute(x_TD: Tensor, source_R: Tensor, position_TK: Tensor, may_be_empty: bool = True) -> Tensor:
    """As `naive.permute`; differentiable once. Eight-bit floats travel as bytes, without a gradient.

    `may_be_empty=False` promises that no source is -1; a position may be.
    """
    if x_TD.element_size() == 1:
        return _permute(x_TD.view(torch.uint8), source_R, position_TK, may_be_empty).view(x_TD.dtype)
    return _permute(x_TD, source_R, position_TK, may_be_empty)


def reorder(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """As `naive.reorder`."""
    return permute(rows_RD, order_R, inverse_R.unsqueeze(1), False)
