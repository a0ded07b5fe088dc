"""Triton's grouped experts equal their reference, forward and backward, whatever the groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wastenot.kernels.grouped_mm import grouped_swiglu

OPCHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
"""All that torch.library.opcheck looks at, one by one."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUPS = [[0], [5], [3, 0, 4], [0, 0, 9], [1] * 6, [40, 0, 1, 20], [0, 33]]
DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def results(sizes: list[int], width: int, hidden: int, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Output and gradients."""
    experts, rows = len(sizes), sum(sizes)
    offsets_e = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    shapes = ((rows, width), (experts, 2 * hidden, width), (experts, width, hidden))
    inputs = [draw(i, *shape, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    y_RD = grouped_swiglu(*inputs, offsets_e, backend=backend)
    weight = torch.linspace(-1, 1, y_RD.numel(), dtype=dtype, device=DEVICE).view_as(y_RD)
    return [y_RD, *torch.autograd.grad(y_RD, inputs, weight)]


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("width", "hidden"), [(24, 40), (7, 5)])
def test_grouped_experts_equal_the_reference(sizes, dtype, tolerance, width, hidden):
    if (width, hidden) == (7, 5) and dtype != torch.float32:
        sizes = sizes[:2]
    fast, plain = (results(sizes, width, hidden, dtype, backend) for backend in ("triton", "reference"))
    for found, expected in zip(fast, plain, strict=True):
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def test_a_hidden_width_of_one():
    fast, plain = (results([3, 2], 16, 1, torch.float32, backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_experts_without_rows_get_zero_gradients():
    _, _, grad_gate_up, grad_down = results([0, 9, 0], 24, 40, torch.float32, "triton")
    for grad in (grad_gate_up, grad_down):
        assert (grad[[0, 2]] == 0).all()
        assert (grad[1] != 0).any()


def test_runs_repeat_to_the_last_bit():
    one, other = (results([17, 3, 0, 12], 24, 40, torch.bfloat16, "triton") for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_double_precision_is_refused_by_name():
    with pytest.raises(ValueError, match=r"kernels: triton cannot group torch\.float64"):
        results([3], 8, 8, torch.float64, "triton")


@pytest.mark.parametrize("test", OPCHECKS)
def test_operators_pass_torchs_own_check(test):
    inputs = [draw(i, *s).requires_grad_() for i, s in enumerate([(5, 16), (2, 16, 16), (2, 16, 8)])]
    offsets_e = torch.tensor([2, 5], dtype=torch.int32, device=DEVICE)
    grouped_swiglu(*inputs, offsets_e, backend="triton")  # registers
    torch.library.opcheck(torch.ops.wastenot.grouped_swiglu.default, (*inputs, offsets_e), test_utils=test)
