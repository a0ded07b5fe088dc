"""Triton's permutation and weighted sum of rows equal their references, forward and backward."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wastenot.kernels.combine import combine
from wastenot.kernels.dispatch import permute, reorder

OPCHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
"""All that torch.library.opcheck looks at, one by one."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = os.environ.get("WASTENOT_GRID") == "full"
examples = settings(max_examples=200 if FULL else 12, deadline=None)
# An element of the sum, and of a gradient, against the reference in the same dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

dtypes = st.sampled_from(list(TOLERANCE))
widths = st.sampled_from([1, 3, 64, 100, 257])
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def placed(tokens: int, k: int, padding: int, lost: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of T * k choices in any order, a part of them without a row, and rows without a choice."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = tokens * k + padding
    position = torch.randperm(num_rows, generator=generator)[: tokens * k]
    position = torch.where(torch.rand(tokens * k, generator=generator) < lost, -1, position)
    source = torch.full((num_rows,), -1)
    source[position[position >= 0]] = torch.arange(tokens).repeat_interleave(k)[position >= 0]
    return position.view(tokens, k).to(DEVICE), source.to(DEVICE)


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return list(torch.autograd.grad(output, inputs, weight))


def assert_equal(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for here, there in zip(found, expected, strict=True):
        scale = max(1.0, there.abs().max().item()) if there.numel() else 1.0
        torch.testing.assert_close(here, there, rtol=0, atol=TOLERANCE[dtype] * scale)


@examples
@given(st.sampled_from([1, 2, 5, 9]), st.sampled_from([1, 2, 3, 8]), widths, dtypes, st.integers(0, 4),
       st.sampled_from([0.0, 0.3, 1.0]), seeds)  # fmt: skip
@example(9, 8, 1030, torch.bfloat16, 2, 0.3, 0)
@example(1, 1, 1, torch.float32, 0, 1.0, 0)
def test_rows_there_and_back_equal_the_reference(tokens, k, width, dtype, padding, lost, seed):
    position_TK, source_R = placed(tokens, k, padding, lost, seed)
    x_TD = draw(seed, tokens, width, dtype=dtype).requires_grad_()
    rows_RD = draw(seed + 1, source_R.numel(), width, dtype=dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    weights_TK = draw(seed + 2, tokens, k, dtype=wide).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        moved_RD = permute(x_TD, source_R, position_TK, backend=backend)
        y_TD = combine(rows_RD, weights_TK, position_TK, source_R, backend=backend)
        results.append([moved_RD, y_TD, *gradients(moved_RD, x_TD), *gradients(y_TD, rows_RD, weights_TK)])
    assert results[0][0].equal(results[1][0]), "rows are copied, bit for bit"
    assert_equal(*results, dtype)


def test_rows_that_are_not_there_are_not_read():
    """Whatever lies in padding and at lost choices stays out of sums and gradients."""
    position_TK, source_R = placed(4, 2, 3, 0.4, 5)
    rows_RD, weights_TK = draw(0, source_R.numel(), 70), draw(1, 4, 2)
    rows_RD[source_R < 0] = torch.nan
    weights_TK[position_TK < 0] = torch.nan
    rows_RD.requires_grad_()
    weights_TK.requires_grad_()
    y_TD = combine(rows_RD, weights_TK, position_TK, source_R, backend="triton")
    assert y_TD.isfinite().all()
    grad_RD, grad_TK = gradients(y_TD, rows_RD, weights_TK)
    assert grad_RD.isfinite().all()
    assert (grad_RD[source_R < 0] == 0).all()
    assert (grad_TK[position_TK < 0] == 0).all()


def test_strided_rows_are_read_by_their_strides():
    position_TK, source_R = placed(5, 2, 1, 0.2, 3)
    wide_TD = draw(0, 5, 200)
    x_TD = wide_TD[:, 50:150]
    expected = permute(x_TD.contiguous(), source_R, position_TK, backend="triton")
    assert permute(x_TD, source_R, position_TK, backend="triton").equal(expected)
    assert permute(x_TD.t().contiguous().t(), source_R, position_TK, backend="triton").equal(expected)


@pytest.fixture
def far_rows(tmp_path: Path) -> Tensor:
    """Four rows, each 2^30 values from the next, in a file that is all holes: the last begins beyond 2^31."""
    size = 3 * 2**30 + 64
    if DEVICE.type == "cuda":
        memory = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=torch.float16)
    rows = memory.as_strided((4, 64), (2**30, 1))
    rows.copy_(draw(0, 4, 64))
    return rows


def test_offsets_beyond_two_to_the_31_are_reached(far_rows):
    position_TK = torch.tensor([[3, 0], [1, 2]], device=DEVICE)
    source_R = torch.tensor([0, 1, 1, 0], device=DEVICE)
    weights_TK = draw(1, 2, 2)
    only_TK = torch.tensor([[-1], [-1], [1], [0]], device=DEVICE)
    assert permute(far_rows, torch.tensor([3, 2], device=DEVICE), only_TK, backend="triton").equal(far_rows[[3, 2]])
    results = []
    for rows, backend in ((far_rows, "triton"), (far_rows.clone(), "reference")):
        inputs = [rows.detach().requires_grad_(), weights_TK.clone().requires_grad_()]
        y_TD = combine(*inputs, position_TK, source_R, backend=backend)
        results.append([y_TD, *gradients(y_TD, *inputs)])
    assert_equal(*results, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_travel_as_bytes(dtype):
    position_TK, source_R = placed(3, 2, 2, 0.3, 1)
    x_TD = draw(0, 3, 48).to(dtype)
    rows_RD = permute(x_TD, source_R, position_TK, backend="triton")
    assert rows_RD.dtype == dtype
    expected = permute(x_TD.float(), source_R, position_TK, backend="reference")
    assert rows_RD.float().equal(expected)


@examples
@given(st.sampled_from([1, 2, 17]), widths, seeds)
def test_reorder_and_its_gradient_equal_the_reference(rows, width, seed):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    x = draw(seed, rows, width).requires_grad_()
    fast, plain = (reorder(x, order, order.argsort(), backend=backend) for backend in ("triton", "reference"))
    assert fast.equal(plain)
    assert gradients(fast, x)[0].equal(gradients(plain, x)[0])


def test_no_rows_and_no_tokens():
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    x_TD = torch.zeros(3, 8, device=DEVICE, requires_grad=True)
    lost_TK = torch.full((3, 2), -1, device=DEVICE)
    rows_RD = permute(x_TD, none, lost_TK, backend="triton")
    assert rows_RD.shape == (0, 8)
    weights_TK = torch.ones(3, 2, device=DEVICE, requires_grad=True)
    y_TD = combine(rows_RD, weights_TK, lost_TK, none, backend="triton")
    assert y_TD.tolist() == [[0.0] * 8] * 3
    grads = torch.autograd.grad(y_TD.sum(), (x_TD, weights_TK))
    assert all(grad.eq(0).all() for grad in grads)
    nobody = permute(x_TD[:0], none, lost_TK[:0], backend="triton")
    assert combine(nobody, weights_TK[:0], lost_TK[:0], none, backend="triton").shape == (0, 8)


@pytest.mark.parametrize("test", OPCHECKS)
def test_operators_pass_torchs_own_check(test):
    position_TK, source_R = placed(3, 2, 1, 0.3, 2)
    x_TD = draw(0, 3, 8).requires_grad_()
    rows_RD, weights_TK = draw(1, 7, 8).requires_grad_(), draw(2, 3, 2).requires_grad_()
    ops = torch.ops.wastenot
    permute(x_TD, source_R, position_TK, backend="triton")  # registers
    torch.library.opcheck(ops.permute.default, (x_TD, source_R, position_TK, True), test_utils=test)
    torch.library.opcheck(ops.permute_backward.default, (draw(3, 7, 8), position_TK), test_utils=test)
    torch.library.opcheck(ops.combine.default, (rows_RD, weights_TK, position_TK, source_R, True), test_utils=test)
    detached = (draw(4, 3, 8), rows_RD.detach(), weights_TK.detach(), position_TK, source_R, True)
    torch.library.opcheck(ops.combine_backward.default, detached, test_utils=test)
