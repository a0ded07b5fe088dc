"""Tokens into rows in Triton: one read of every token that a row wants, one write of every row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..combine.kernel import sum_rows
from ..launching import launch
from ..tiles import dense_rows, grid_of, row_tile


@triton.jit
def gather_fwd(
    x_ptr,  # [T, D]
    source_ptr,  # int64 [R]
    rows_ptr,  # [R, D]
    D,
    x_stride,
    BLOCK_D: tl.constexpr,
):
    """rows[r] = x[source[r]], or zero where the source is below 0."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(source_ptr + row)
    value = tl.load(x_ptr + token * x_stride + col, mask=(col < D) & (token >= 0), other=0.0)
    tl.store(rows_ptr + row * D + col, value, mask=col < D)


def gather(x_TD: Tensor, source_R: Tensor) -> Tensor:
    """Row r is x_TD[source_R[r]], or zero where that is below 0; [R, D] of any dtype."""
    R, D = source_R.numel(), x_TD.size(1)
    rows_RD = x_TD.new_empty(R, D)
    if rows_RD.numel():
        tile, x_TD = row_tile(D), dense_rows(x_TD)
        launch(
            gather_fwd,
            grid_of(R, D, tile),
            x_TD,
            source_R.contiguous(),
            rows_RD,
            D,
            x_TD.stride(0),
            BLOCK_D=tile.block,
            num_warps=tile.warps,
        )
    return rows_RD


@torch.library.custom_op("wastenot::permute", mutates_args=())
def _permute(x_TD: Tensor, source_R: Tensor, position_TK: Tensor) -> Tensor:
    return gather(x_TD, source_R)


@_permute.register_fake
def _(x_TD: Tensor, source_R: Tensor, position_TK: Tensor) -> Tensor:
    return x_TD.new_empty(source_R.numel(), x_TD.size(1))


@torch.library.custom_op("wastenot::permute_backward", mutates_args=())
def _permute_backward(grad_RD: Tensor, position_TK: Tensor) -> Tensor:
    return sum_rows(grad_RD, None, position_TK)


@_permute_backward.register_fake
def _(grad_RD: Tensor, position_TK: Tensor) -> Tensor:
    return grad_RD.new_empty(position_TK.size(0), grad_RD.size(1))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx, grad_RD: Tensor):
    return _permute_backward(grad_RD, *ctx.saved_tensors), None, None


_permute.register_autograd(_backward, setup_context=_save)


def permute(x_TD: Tensor, source_R: Tensor, position_TK: Tensor) -> Tensor:
    """As `naive.permute`; differentiable once. Eight-bit floats travel as bytes, without a gradient."""
    if x_TD.element_size() == 1:
        return _permute(x_TD.view(torch.uint8), source_R, position_TK).view(x_TD.dtype)
    return _permute(x_TD, source_R, position_TK)


def reorder(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """As `naive.reorder`."""
    return permute(rows_RD, order_R, inverse_R.unsqueeze(1))
