"""The expert feed-forward in Triton: grouped matrix products, SwiGLU in the epilogue of the first.

grouped_fwd      rows times their own expert's matrix; also the gradient of rows, with the matrix taken the other way
gate_up_fwd      the same against gate and up rows at once; writes silu(gate) * up, and both for backward
grouped_wgrad    per expert, gradient rows transposed times input rows
swiglu_bwd       gradients of gate and up, and the hidden rows formed again for the gradient of down

The number of tiles depends on the number of rows and experts alone; which expert a tile belongs to is found on the
device, so nothing waits for the host. Sums run over a fixed order of blocks: bits depend on shapes and dtypes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import interpreted, launch
from ..operator import operator
from ..tiles import dense_rows, grid_of, pieces, power_of_two, row_tile


@dataclass(frozen=True)
class Blocks:
    """Sizes of a tile of a product, how many warps share it, and how many loads are under way."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


HALF = Blocks(rows=128, cols=128, inner=64, warps=8, stages=3)
HALF_PAIR = Blocks(rows=128, cols=64, inner=64, warps=8, stages=3)
"""For two products at once."""
SINGLE = Blocks(rows=64, cols=64, inner=32, warps=4, stages=2)
SINGLE_PAIR = Blocks(rows=64, cols=32, inner=32, warps=4, stages=2)
FEW = Blocks(rows=16, cols=64, inner=64, warps=4, stages=3)
"""Where experts have a handful of rows each."""
INTERPRETED = Blocks(rows=16, cols=32, inner=32, warps=1, stages=1)
"""Of the interpreter, to which the number of programs is everything; small enough that tests have several."""


def blocks_for(rows: int, experts: int, dtype: torch.dtype, pair: bool = False) -> Blocks:
    """What a product of so many rows runs with; a function of shapes and dtype alone."""
    if interpreted():
        return INTERPRETED
    if dtype == torch.float32:
        return SINGLE_PAIR if pair else SINGLE
    if rows <= 32 * experts:
        return FEW
    return HALF_PAIR if pair else HALF


@triton.jit
def _tile(offsets_ptr, tile, E, ROWS: tl.constexpr, PAD_E: tl.constexpr):
    """The expert of a tile, its first row and the end of its rows; an end of 0 where there is no such tile."""
    expert = tl.arange(0, PAD_E)
    end = tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    start = tl.load(offsets_ptr + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    tiles = tl.where(expert < E, (end - start + ROWS - 1) // ROWS, 0)
    until = tl.cumsum(tiles, 0)
    mine = (tile < until) & (tile >= until - tiles)
    first = start + (tile - until + tiles) * ROWS
    return (
        tl.sum(tl.where(mine, expert, 0), 0).to(tl.int64),
        tl.sum(tl.where(mine, first, 0), 0),
        tl.sum(tl.where(mine, end, 0), 0),
    )


@triton.jit
def _widened(value, WIDEN: tl.constexpr):
    # The interpreter multiplies bf16 wrongly.
    if WIDEN:
        value = value.to(tl.float32)
    return value


@triton.jit
def grouped_fwd(
    x_ptr,  # [R, N]
    w_ptr,  # [E, M, N], by its strides
    offsets_ptr,  # int32 [E]
    y_ptr,  # [R, M]
    E,
    M,
    N,
    x_stride,
    w_stride_e,
    w_stride_m,
    w_stride_n,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    PAD_E: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """y[r] = w[expert of r] x[r]."""
    expert, first, end = _tile(offsets_ptr, tl.program_id(0), E, ROWS, PAD_E)  # pyright: ignore[reportGeneralTypeIssues]
    if end == 0:
        return
    row = first + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    x_at = x_ptr + row[:, None].to(tl.int64) * x_stride
    w_at = w_ptr + expert * w_stride_e + col[None, :].to(tl.int64) * w_stride_m
    total = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(0, N, INNER):
        inner = begin + tl.arange(0, INNER)
        x = tl.load(x_at + inner[None, :], mask=(row[:, None] < end) & (inner[None, :] < N), other=0.0)
        w = tl.load(
            w_at + inner[:, None].to(tl.int64) * w_stride_n, mask=(col[None, :] < M) & (inner[:, None] < N), other=0.0
        )
        total = tl.dot(_widened(x, WIDEN), _widened(w, WIDEN), total, input_precision="ieee")
    y_at = y_ptr + row[:, None].to(tl.int64) * M + col[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=(row[:, None] < end) & (col[None, :] < M))


@triton.jit
def gate_up_fwd(
    x_ptr,  # [R, N]
    w_ptr,  # [E, 2F, N], gate rows above up rows
    offsets_ptr,  # int32 [E]
    gate_up_ptr,  # [R, 2F]
    hidden_ptr,  # [R, F]
    E,
    F,
    N,
    x_stride,
    w_stride_e,
    w_stride_m,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    PAD_E: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """gate, up = w[expert of r] x[r]; hidden[r] = silu(gate) * up, of the rounded gate and up that backward reads."""
    expert, first, end = _tile(offsets_ptr, tl.program_id(0), E, ROWS, PAD_E)  # pyright: ignore[reportGeneralTypeIssues]
    if end == 0:
        return
    row = first + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    x_at = x_ptr + row[:, None].to(tl.int64) * x_stride
    gate_at = w_ptr + expert * w_stride_e + col[None, :].to(tl.int64) * w_stride_m
    up_at = w_ptr + expert * w_stride_e + (col[None, :].to(tl.int64) + F) * w_stride_m
    gate = tl.zeros([ROWS, COLS], tl.float32)
    up = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(0, N, INNER):
        inner = begin + tl.arange(0, INNER)
        x = tl.load(x_at + inner[None, :], mask=(row[:, None] < end) & (inner[None, :] < N), other=0.0)
        x = _widened(x, WIDEN)
        there = (col[None, :] < F) & (inner[:, None] < N)
        w_gate = _widened(tl.load(gate_at + inner[:, None], mask=there, other=0.0), WIDEN)
        w_up = _widened(tl.load(up_at + inner[:, None], mask=there, other=0.0), WIDEN)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
    mask = (row[:, None] < end) & (col[None, :] < F)
    kind = gate_up_ptr.dtype.element_ty
    gate, up = gate.to(kind), up.to(kind)
    at = row[:, None].to(tl.int64) * (2 * F) + col[None, :]
    tl.store(gate_up_ptr + at, gate, mask=mask)
    tl.store(gate_up_ptr + at + F, up, mask=mask)
    hidden = _silu(gate.to(tl.float32)) * up.to(tl.float32)
    tl.store(hidden_ptr + row[:, None].to(tl.int64) * F + col[None, :], hidden.to(kind), mask=mask)


@triton.jit
def _silu(value):
    return value / (1 + tl.exp(-value))


@triton.jit
def grouped_wgrad(
    grad_ptr,  # [R, M]
    x_ptr,  # [R, N]
    offsets_ptr,  # int32 [E]
    w_ptr,  # [E, M, N]
    M,
    N,
    grad_stride,
    x_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """w[e] = grad[rows of e]^T x[rows of e]; zeros for an expert without rows."""
    expert = tl.program_id(2).to(tl.int64)
    end = tl.load(offsets_ptr + expert)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(start, end, INNER):
        row = (begin + tl.arange(0, INNER)).to(tl.int64)
        grad = tl.load(
            grad_ptr + row[None, :] * grad_stride + m[:, None], mask=(row[None, :] < end) & (m[:, None] < M), other=0.0
        )
        x = tl.load(
            x_ptr + row[:, None] * x_stride + n[None, :], mask=(row[:, None] < end) & (n[None, :] < N), other=0.0
        )
        total = tl.dot(_widened(grad, WIDEN), _widened(x, WIDEN), total, input_precision="ieee")
    at = w_ptr + expert * M * N + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at, total.to(w_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def swiglu_bwd(
    grad_ptr,  # [R, F]: gradient of the hidden rows
    gate_up_ptr,  # [R, 2F]
    grad_gate_up_ptr,  # [R, 2F]
    hidden_ptr,  # [R, F]
    F,
    BLOCK_D: tl.constexpr,
):
    """Gradients of gate and up, and silu(gate) * up once more."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = col < F
    gate = tl.load(gate_up_ptr + row * 2 * F + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + col, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + col, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    active = gate * sigmoid
    kind = hidden_ptr.dtype.element_ty
    tl.store(hidden_ptr + row * F + col, (active * up).to(kind), mask=mask)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(grad_gate_up_ptr + row * 2 * F + col, grad_gate.to(kind), mask=mask)
    tl.store(grad_gate_up_ptr + row * 2 * F + F + col, (grad * active).to(kind), mask=mask)


def product(x_RN: Tensor, w_EMN: Tensor, offsets_e: Tensor) -> Tensor:
    """Each row times the transpose of its own expert's matrix, of any strides; [R, M]."""
    (R, N), (E, M, _) = x_RN.shape, w_EMN.shape
    y_RM = x_RN.new_empty(R, M)
    if y_RM.numel():
        x_RN, blocks = dense_rows(x_RN), blocks_for(R, E, x_RN.dtype)
        launch(
            grouped_fwd,
            _grid(R, E, M, blocks),
            x_RN,
            w_EMN,
            offsets_e,
            y_RM,
            E,
            M,
            N,
            x_RN.stride(0),
            *w_EMN.stride(),
            **_options(blocks, x_RN, E),
        )
    return y_RM


def gate_up_product(x_RN: Tensor, w_E2FN: Tensor, offsets_e: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up rows [R, 2F] beside one another, and silu(gate) * up [R, F]."""
    (R, N), (E, twice, _) = x_RN.shape, w_E2FN.shape
    gate_up_R2F, hidden_RF = x_RN.new_empty(R, twice), x_RN.new_empty(R, twice // 2)
    if gate_up_R2F.numel():
        x_RN, w_E2FN = dense_rows(x_RN), dense_rows(w_E2FN)
        blocks = blocks_for(R, E, x_RN.dtype, pair=True)
        launch(gate_up_fwd, _grid(R, E, twice // 2, blocks),
            x_RN, w_E2FN, offsets_e, gate_up_R2F, hidden_RF, E, twice // 2, N, x_RN.stride(0), *w_E2FN.stride()[:2],
            **_options(blocks, x_RN, E),
        )  # fmt: skip
    return gate_up_R2F, hidden_RF


def weight_gradient(grad_RM: Tensor, x_RN: Tensor, offsets_e: Tensor) -> Tensor:
    """Per expert the product of gradient rows, transposed, and input rows; [E, M, N]."""
    M, N, E = grad_RM.size(1), x_RN.size(1), offsets_e.numel()
    w_EMN = x_RN.new_empty(E, M, N)
    if w_EMN.numel():
        grad_RM, x_RN = dense_rows(grad_RM), dense_rows(x_RN)
        # Experts share the rows evenly or not: a tile of the result costs as much as its expert has.
        blocks = blocks_for(1 << 30, E, x_RN.dtype)
        grid = (pieces(M, blocks.rows), pieces(N, blocks.cols), E)
        options = _options(blocks, x_RN, E)
        del options["PAD_E"]
        launch(grouped_wgrad, grid, grad_RM, x_RN, offsets_e, w_EMN, M, N, grad_RM.stride(0), x_RN.stride(0), **options)
    return w_EMN


def activation_gradient(grad_RF: Tensor, gate_up_R2F: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of gate and up rows [R, 2F], and the hidden rows [R, F]."""
    R, F = grad_RF.shape
    grad_R2F, hidden_RF = torch.empty_like(gate_up_R2F), torch.empty_like(grad_RF)
    if grad_RF.numel():
        tile = row_tile(F)
        launch(
            swiglu_bwd,
            grid_of(R, F, tile),
            grad_RF,
            gate_up_R2F,
            grad_R2F,
            hidden_RF,
            F,
            BLOCK_D=tile.block,
            num_warps=tile.warps,
        )
    return grad_R2F, hidden_RF


def _grid(rows: int, experts: int, cols: int, blocks: Blocks) -> tuple[int, int]:
    """Every expert may have one tile that is not full."""
    return pieces(rows, blocks.rows) + experts, pieces(cols, blocks.cols)


def _options(blocks: Blocks, x: Tensor, experts: int) -> dict[str, int | bool]:
    return {
        "ROWS": blocks.rows,
        "COLS": blocks.cols,
        "INNER": blocks.inner,
        "PAD_E": power_of_two(experts),
        "WIDEN": interpreted() and x.dtype == torch.bfloat16,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _forward(x_RD: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor) -> tuple[Tensor, Tensor]:
    gate_up_R2F, hidden_RF = gate_up_product(x_RD, gate_up_e2FD, offsets_e)
    return product(hidden_RF, down_eDF, offsets_e), gate_up_R2F


def _forward_fake(x_RD, gate_up_e2FD, down_eDF, offsets_e):
    R = x_RD.size(0)
    return x_RD.new_empty(R, down_eDF.size(1)), x_RD.new_empty(R, gate_up_e2FD.size(1))


def differentiate(
    grad_RD: Tensor, x_RD: Tensor, gate_up_R2F: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input rows, the gate and up matrices, and the down matrices."""
    grad_RF = product(grad_RD, down_eDF.transpose(1, 2), offsets_e)
    grad_R2F, hidden_RF = activation_gradient(grad_RF, gate_up_R2F)
    grad_down = weight_gradient(grad_RD, hidden_RF, offsets_e)
    grad_gate_up = weight_gradient(grad_R2F, x_RD, offsets_e)
    return product(grad_R2F, gate_up_e2FD.transpose(1, 2), offsets_e), grad_gate_up, grad_down


def _differentiate_fake(grad_RD, x_RD, gate_up_R2F, gate_up_e2FD, down_eDF, offsets_e):
    return x_RD.new_empty(x_RD.shape), gate_up_e2FD.new_empty(gate_up_e2FD.shape), down_eDF.new_empty(down_eDF.shape)


def _save(ctx, inputs, output) -> None:
    x_RD, gate_up_e2FD, down_eDF, offsets_e = inputs
    ctx.save_for_backward(x_RD, output[1], gate_up_e2FD, down_eDF, offsets_e)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_RD: Tensor, _):
    return *_grouped_swiglu_backward(grad_RD, *ctx.saved_tensors), None


_grouped_swiglu_backward = operator("grouped_swiglu_backward", differentiate, _differentiate_fake)
_grouped_swiglu = operator("grouped_swiglu", _forward, _forward_fake, _save, _backward)


def grouped_swiglu(x_RD: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor) -> Tensor:
    """As `naive.grouped_swiglu`, in fp32, bf16 or fp16 and of any widths; differentiable once."""
    return _grouped_swiglu(x_RD, gate_up_e2FD, down_eDF, offsets_e)[0]
