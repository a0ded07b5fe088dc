"""An operation is the same called directly, through the registry, and where nothing has values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wastenot.kernels.operator import operator


def cube(x: Tensor, factor: float) -> Tensor:
    # Raises for tensors without values.
    assert x.data_ptr() is not None
    return factor * x**3


def save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def backward(ctx, grad: Tensor):
    return 3 * ctx.factor * ctx.saved_tensors[0] ** 2 * grad, None


scaled_cube = operator("test_cube", cube, lambda x, factor: torch.empty_like(x), save, backward)
plain_cube = operator("test_plain_cube", cube, lambda x, factor: torch.empty_like(x))


def test_both_ways_compute_the_same():
    x = torch.arange(4.0, requires_grad=True)
    results = []
    for call in (scaled_cube, torch.ops.wastenot.test_cube.default, torch.compile(scaled_cube, backend="aot_eager")):
        y = call(x, 2.0)
        results.append([y, *torch.autograd.grad(y.sum(), x)])
    assert results[0][0].tolist() == [0, 2, 16, 54]
    assert results[0][1].tolist() == [0, 6, 24, 54]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_an_operation_without_a_gradient_has_none():
    assert not plain_cube(torch.ones(2), 1.0).requires_grad
    assert torch.compile(plain_cube, backend="eager", fullgraph=True)(torch.ones(2), 3.0).tolist() == [3, 3]


def test_tensors_without_values_stay_out_of_the_function():
    with FakeTensorMode():
        assert scaled_cube(torch.empty(5), 1.0).shape == plain_cube(torch.empty(5), 1.0).shape == (5,)


def test_a_second_derivative_is_refused():
    x = torch.ones(1, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled_cube(x, 1.0), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.backward()
