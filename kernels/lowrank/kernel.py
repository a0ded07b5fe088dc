"""One pass over gradients in Triton: V = beta2 max(Q U^T, 0) + (1 - beta2) G^2 lives in registers alone.

lowrank_times   V X, and of the update G / (sqrt(V) + eps) the sum of squares
lowrank_step    V^T Y, and the step: first moment and weights are read and written once

Matrices may lie anywhere: their addresses come as a table. Products of fp32 are made of three of TF32 each, which is
as near as fp32. Sums are cut by the size of one matrix: their bits depend on nothing that stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import interpreted, launch
from ..tiles import pieces, power_of_two
from .step import Step

_MOST_COLUMNS = 64
"""Of factors and of what is multiplied: more do not fit in registers."""
_SCALED = 128
"""Entries of a row whose int8 codes share a scale."""


@dataclass(frozen=True)
class Blocks:
    """The part of V that a program holds at a time, its warps, and how many loads are under way."""

    rows: int
    cols: int
    warps: int
    stages: int


TIMES = Blocks(rows=64, cols=64, warps=4, stages=1)
TIMES_FEW = Blocks(rows=64, cols=32, warps=4, stages=1)
"""For up to 16 columns."""
STEP = Blocks(rows=32, cols=_SCALED, warps=8, stages=2)
"""Its columns are those of one scale of int8 codes."""


def chunk_of(m: int, n: int) -> int:
    """Rows or columns that a program walks over; by the size of one matrix alone. Few where few programs would be."""
    if interpreted():
        return 2 * _SCALED
    return 1024 if m * n > 2**21 else 256


@triton.jit
def _square(
    q, u, grads_ptr, matrix, row, col, inside, stride, beta2, newest,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A block of V and of G; zeros outside."""
    grad_ptr = tl.load(grads_ptr + matrix).to(tl.pointer_type(GRAD))  # pyright: ignore[reportArgumentType]
    if ALIGNED:
        grad_ptr = tl.multiple_of(grad_ptr, 16)
    grad = tl.load(grad_ptr + row[:, None] * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    product = tl.dot(q, tl.trans(u), input_precision="tf32x3")
    return beta2 * tl.maximum(product, 0.0) + newest * grad * grad, grad


@triton.jit
def _factor(factor_ptr, matrix, row, rows, column, columns):
    """Rows of one matrix of [b, rows, columns]; zeros outside."""
    at = factor_ptr + matrix * rows * columns + row[:, None] * columns + column[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def lowrank_times(
    q_ptr,  # fp32 [b, m, k]
    u_ptr,  # fp32 [b, n, k]
    x_ptr,  # fp32 [b, n, c]
    grads_ptr,  # int64 [b], addresses of [m, n]
    y_ptr,  # fp32 [pieces of n, b, m, c]
    updates_ptr,  # fp32 [programs of a matrix, b], or anything where not MEASURE
    squares_ptr,  # fp64 [programs of a matrix, b], or anything where not SQUARES
    m,
    n,
    k,
    c,
    grad_stride,
    beta2,
    newest,
    eps,
    MEASURE: tl.constexpr,
    SQUARES: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """y = V x over one piece of the columns; sums of (G / (sqrt(V) + eps))^2 and of V^2."""
    matrix, piece = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_k, at_c = tl.arange(0, K), tl.arange(0, C)
    q = _factor(q_ptr, matrix, row, m, at_k, k)
    total = tl.zeros([ROWS, C], tl.float32)
    updates = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float64)
    for start in range(0, CHUNK, COLS):
        col = piece * CHUNK + start + tl.arange(0, COLS)
        inside = (row < m)[:, None] & (col < n)[None, :]
        u = _factor(u_ptr, matrix, col, n, at_k, k)
        moment, grad = _square(  # pyright: ignore[reportGeneralTypeIssues]
            q, u, grads_ptr, matrix, row, col, inside, grad_stride, beta2, newest, GRAD, ALIGNED
        )
        if MEASURE:
            update = grad / (tl.sqrt(moment) + eps)
            updates += tl.sum(update * update, 1)
        if SQUARES:
            # Squares of squares would leave fp32.
            wide = moment.to(tl.float64)
            squares += tl.sum(wide * wide, 1)
        x = _factor(x_ptr, matrix, col, n, at_c, c)
        total = tl.dot(moment, x, total, input_precision="tf32x3")
    b = tl.num_programs(1)
    out = y_ptr + ((piece * b + matrix) * m + row[:, None]) * c + at_c[None, :]
    tl.store(out, total, mask=(row < m)[:, None] & (at_c < c)[None, :])
    program = (piece * tl.num_programs(0) + tl.program_id(0)) * b + matrix
    if MEASURE:
        tl.store(updates_ptr + program, tl.sum(updates, 0))
    if SQUARES:
        tl.store(squares_ptr + program, tl.sum(squares, 0))


@triton.jit
def _momentum(at, scale_at, there, inside, KIND: tl.constexpr):
    """A block of the first moment, as `momentum.read` has it."""
    if KIND == "int8":
        root = tl.load(at, mask=inside, other=0).to(tl.float32) / 127.0
        return root * tl.abs(root) * tl.load(scale_at, mask=there, other=0.0)[:, None]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _keep_momentum(at, scale_at, average, there, inside, KIND: tl.constexpr):
    """Stores it, as `momentum.write` does."""
    if KIND == "int8":
        scale = tl.max(tl.abs(average), 1)
        tl.store(scale_at, scale, mask=there)
        part = average / tl.where(scale == 0, 1.0, scale)[:, None]
        code = tl.floor(tl.sqrt(tl.abs(part)) * 127.0 + 0.5)
        tl.store(at, tl.where(part < 0, -code, code).to(tl.int8), mask=inside)
    else:
        tl.store(at, average.to(at.dtype.element_ty), mask=inside)


@triton.jit
def lowrank_step(
    q_ptr,  # fp32 [b, m, k]
    u_ptr,  # fp32 [b, n, k]
    y_ptr,  # fp32 [b, m, c]
    grads_ptr,  # int64 [b], addresses of [m, n]
    weights_ptr,  # the same, or anything where not APPLY
    moments_ptr,  # the same, or anything where KIND is "none"
    scales_ptr,  # addresses of fp32 [m, pieces of 128], or anything where KIND is not "int8"
    clip_ptr,  # fp32 [b], or anything where not APPLY
    x_ptr,  # fp32 [pieces of m, b, n, c]
    m,
    n,
    k,
    c,
    grad_stride,
    weight_stride,
    moment_stride,
    scale_stride,
    beta2,
    newest,
    eps,
    weigh_new,
    decay,
    step_size,
    APPLY: tl.constexpr,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """x = V^T y over one piece of the rows; W = decay W - step_size M with M = M + weigh_new (clip G / (...) - M)."""
    matrix, piece = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    at_k, at_c = tl.arange(0, K), tl.arange(0, C)
    u = _factor(u_ptr, matrix, col, n, at_k, k)
    total = tl.zeros([COLS, C], tl.float32)
    if APPLY:
        clip = tl.load(clip_ptr + matrix)
        weight_ptr = tl.load(weights_ptr + matrix).to(tl.pointer_type(GRAD))  # pyright: ignore[reportArgumentType]
        if ALIGNED:
            weight_ptr = tl.multiple_of(weight_ptr, 16)
        if KIND != "none":
            moment_ptr = tl.load(moments_ptr + matrix).to(tl.pointer_type(MOMENT))  # pyright: ignore[reportArgumentType]
            scale_ptr = moment_ptr
            if ALIGNED:
                moment_ptr = tl.multiple_of(moment_ptr, 16)
            if KIND == "int8":
                scale_ptr = tl.load(scales_ptr + matrix).to(tl.pointer_type(tl.float32))
    for start in range(0, CHUNK, ROWS):
        row = piece * CHUNK + start + tl.arange(0, ROWS)
        inside = (row < m)[:, None] & (col < n)[None, :]
        q = _factor(q_ptr, matrix, row, m, at_k, k)
        moment, grad = _square(  # pyright: ignore[reportGeneralTypeIssues]
            q, u, grads_ptr, matrix, row, col, inside, grad_stride, beta2, newest, GRAD, ALIGNED
        )
        if APPLY:
            step = clip * grad / (tl.sqrt(moment) + eps)
            if KIND != "none":
                at = moment_ptr + row[:, None] * moment_stride + col[None, :]
                scale_at = scale_ptr + row * scale_stride + tl.program_id(0)
                average = _momentum(at, scale_at, row < m, inside, KIND)
                step = average + weigh_new * (step - average)
                _keep_momentum(at, scale_at, step, row < m, inside, KIND)
            where = weight_ptr + row[:, None] * weight_stride + col[None, :]
            weight = tl.load(where, mask=inside, other=0.0).to(tl.float32)
            tl.store(where, (decay * weight - step_size * step).to(GRAD), mask=inside)
        y = _factor(y_ptr, matrix, row, m, at_c, c)
        total = tl.dot(tl.trans(moment), y, total, input_precision="tf32x3")
    out = x_ptr + ((piece * tl.num_programs(1) + matrix) * n + col[:, None]) * c + at_c[None, :]
    tl.store(out, total, mask=(col < n)[:, None] & (at_c < c)[None, :])


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


@dataclass(frozen=True)
class Placed:
    """Stacks [b_i, m, n] of one dtype as b matrices: where each lies, and how far apart its rows are."""

    places: tuple[int, ...]
    stride: int
    dtype: torch.dtype
    aligned: bool
    """Whether all rows begin at multiples of 16 bytes."""

    @classmethod
    def of(cls, stacks: Sequence[Tensor]) -> Placed | None:
        """None where rows are not side by side, or stacks differ in what a kernel must know."""
        first = stacks[0]
        size, stride = first.element_size(), first.stride(1)
        if any(s.stride(2) != 1 or s.stride(1) != stride or s.dtype != first.dtype for s in stacks if s.numel()):
            return None
        places = tuple(s.data_ptr() + i * s.stride(0) * size for s in stacks for i in range(s.size(0)))
        aligned = stride * size % 16 == 0 and all(place % 16 == 0 for place in places)
        return cls(places, stride, first.dtype, aligned)


class FusedMoment:
    """V of b matrices as `vectorised.SecondMoment` has it, on a CUDA device, with the step in the same two passes."""

    def __init__(
        self,
        q_bmk: Tensor,
        u_bnk: Tensor,
        grads: Placed,
        weights: Placed,
        moments: Placed | None,
        scales: Placed | None,
        beta2: float,
        eps: float,
    ) -> None:
        self.q_bmk, self.u_bnk = q_bmk.contiguous(), u_bnk.contiguous()
        self.grads, self.weights, self.moments, self.scales = grads, weights, moments or grads, scales or grads
        self.kind = "none" if moments is None else "plain" if scales is None else "int8"
        placed = (self.grads, self.weights, self.moments, self.scales)
        self.tables_4b = torch.tensor([each.places for each in placed], dtype=torch.int64).to(q_bmk.device)
        self.beta2, self.eps = beta2, eps
        self.most_columns = _most_columns(q_bmk.device)
        """Of what it multiplies."""
        (self.b, self.m, self.k), self.n = q_bmk.shape, u_bnk.size(1)

    @classmethod
    def of(
        cls,
        q_bmk: Tensor,
        u_bnk: Tensor,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        momenta: Sequence[Mapping[str, Tensor]],
        beta2: float,
        eps: float,
    ) -> FusedMoment | None:
        """None where kernels cannot: wide factors, fp64, memory laid out otherwise.

        grads, weights: [b_i, m, n], whose b_i sum to b. momenta: of each, `exp_avg` and perhaps `exp_avg_scale`.
        """
        if q_bmk.dtype != torch.float32 or not q_bmk.numel() * u_bnk.numel():
            return None
        if q_bmk.size(2) > _most_columns(q_bmk.device):
            return None
        stacks = [grads, weights]
        stacks += [[each[key] for each in momenta] for key in ("exp_avg", "exp_avg_scale") if key in momenta[0]]
        placed = [Placed.of(some) if some[0].dtype in _TYPES else None for some in stacks]
        there = [one for one in placed if one is not None]
        if len(there) < len(placed) or there[0].dtype != there[1].dtype:
            return None
        moments, scales = there[2] if len(there) > 2 else None, there[3] if len(there) > 3 else None
        return cls(q_bmk, u_bnk, there[0], there[1], moments, scales, beta2, eps)

    def times(self, x_bnc: Tensor, measure: bool = False, squares: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """V X [b, m, c]; if `measure`, sums of (G / (sqrt(V) + eps))^2, and if `squares`, of V^2: fp64 [b], else 0."""
        b, m, n, c = self.b, self.m, self.n, x_bnc.size(2)
        blocks, chunk = TIMES_FEW if max(self.k, c) <= 16 else TIMES, chunk_of(m, n)
        num_rows, num_pieces = pieces(m, blocks.rows), pieces(n, chunk)
        y_pbmc = x_bnc.new_empty(num_pieces, b, m, c)
        updates_pb = x_bnc.new_zeros(num_pieces * num_rows if measure else 1, b)
        squares_pb = x_bnc.new_zeros(num_pieces * num_rows if squares else 1, b, dtype=torch.float64)
        launch(lowrank_times, (num_rows, b, num_pieces),
            self.q_bmk, self.u_bnk, x_bnc.contiguous(), self.tables_4b[0], y_pbmc, updates_pb, squares_pb,
            m, n, self.k, c, self.grads.stride, float(self.beta2), float(1 - self.beta2), float(self.eps),
            MEASURE=measure, SQUARES=squares, GRAD=_TYPES[self.grads.dtype], ALIGNED=self.grads.aligned,
            K=max(16, power_of_two(self.k)), C=max(16, power_of_two(c)),
            ROWS=blocks.rows, COLS=blocks.cols, CHUNK=chunk, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        return _summed(y_pbmc), updates_pb.double().sum(0), squares_pb.sum(0)

    def transposed_times(self, y_bmc: Tensor, step: Step | None = None) -> Tensor:
        """V^T Y [b, n, c]; with `step`, weights and first moments are stepped in place."""
        b, m, n, c = self.b, self.m, self.n, y_bmc.size(2)
        blocks, chunk = STEP, chunk_of(m, n)
        num_pieces = pieces(m, chunk)
        x_pbnc = y_bmc.new_empty(num_pieces, b, n, c)
        placed = (self.grads, self.weights, self.moments)
        launch(lowrank_step, (pieces(n, blocks.cols), b, num_pieces),
            self.q_bmk, self.u_bnk, y_bmc.contiguous(),
            *self.tables_4b,
            self.q_bmk if step is None else step.clip_b, x_pbnc,
            m, n, self.k, c, self.grads.stride, self.weights.stride, self.moments.stride, self.scales.stride,
            float(self.beta2), float(1 - self.beta2), float(self.eps),
            *((0.0, 0.0, 0.0) if step is None else (float(step.weigh_new), float(step.decay), float(step.step_size))),
            APPLY=step is not None, KIND=self.kind, GRAD=_TYPES[self.grads.dtype], MOMENT=_TYPES[self.moments.dtype],
            ALIGNED=all(each.aligned for each in placed),
            K=max(16, power_of_two(self.k)), C=max(16, power_of_two(c)),
            ROWS=blocks.rows, COLS=blocks.cols, CHUNK=chunk, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        return _summed(x_pbnc)


def _most_columns(device: torch.device) -> int:
    """As many as find room beside a block in the shared memory of a multiprocessor."""
    if device.type != "cuda":
        return _MOST_COLUMNS
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return _MOST_COLUMNS if room >= 144 * 2**10 else _MOST_COLUMNS // 2 if room >= 97 * 2**10 else 0


def _summed(parts: Tensor) -> Tensor:
    return parts[0] if parts.size(0) == 1 else parts.sum(0)
