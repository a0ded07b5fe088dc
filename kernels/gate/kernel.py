"""The gate's logits with Triton: its matrix falls into parts of bf16 in one pass; the products stay with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from ..operator import operator
from ..tiles import dense_rows, grid_of, row_tile
from .vectorised import differentiate, product


@triton.jit
def split_fwd(
    wide_ptr,  # fp32 [R, C]
    parts_ptr,  # bf16, one [R, C] after the other
    C,
    wide_stride,
    row_stride,
    part_stride,
    ORDER: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Parts of each value, 0 the highest, in ORDER: each is what the higher ones leave, rounded."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = col < C
    wide = tl.load(wide_ptr + row * wide_stride + col, mask=inside, other=0.0)
    high = wide.to(tl.bfloat16)
    rest = wide - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    parts = (high, middle, low)
    for place in tl.static_range(len(ORDER)):  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
        at = parts_ptr + place * part_stride + row * row_stride + col
        tl.store(at, parts[ORDER[place]], mask=inside)


def split(wide_RC: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """As `vectorised.split`."""
    (R, C), number = wide_RC.shape, len(order)
    parts = wide_RC.new_empty((number * R, C) if dim == 0 else (R, number * C), dtype=torch.bfloat16)
    if parts.numel():
        tile, wide_RC = row_tile(C), dense_rows(wide_RC)
        launch(split_fwd, grid_of(R, C, tile),
            wide_RC, parts, C, wide_RC.stride(0), parts.stride(0), R * C if dim == 0 else C,
            ORDER=tuple(order), BLOCK_C=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    return parts


def _forward(x_TD: Tensor, weight_ED: Tensor, blocks: int) -> Tensor:
    return product(x_TD, weight_ED, blocks, split)


def _forward_fake(x_TD, weight_ED, blocks):
    return x_TD.new_empty(x_TD.size(0), weight_ED.size(0), dtype=torch.float32)


def _gradients(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    return differentiate(grad_TE, x_TD, weight_ED, split)


def _gradients_fake(grad_TE, x_TD, weight_ED):
    return x_TD.new_empty(x_TD.shape), weight_ED.new_empty(weight_ED.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad_TE: Tensor):
    return *_gate_backward(grad_TE, *ctx.saved_tensors), None


_gate_backward = operator("gate_backward", _gradients, _gradients_fake)
_gate = operator("gate", _forward, _forward_fake, _save, _backward)


def gate(x_TD: Tensor, weight_ED: Tensor, blocks: int) -> Tensor:
    """As `naive.gate`, for dtypes that `vectorised` supports; differentiable once."""
    return _gate(x_TD, weight_ED, blocks)
