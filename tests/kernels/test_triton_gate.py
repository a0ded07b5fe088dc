"""The gate's logits through parts of bf16 are those of fp32, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wastenot.kernels.gate import gate, kernel, vectorised
from wastenot.kernels.gate.vectorised import HIGH, LOW, MIDDLE
from wastenot.moe.config import RouterConfig
from wastenot.moe.router import TopKRouter

OPCHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
"""All that torch.library.opcheck looks at, one by one."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (2, 257), (5, 1030), (0, 4)])
def test_parts_add_up_to_the_last_bit(shape):
    wide_RC = draw(0, *shape) * torch.logspace(-30, 30, shape[1], device=DEVICE)
    parts = [kernel.split(wide_RC, (part,), 0) for part in (HIGH, MIDDLE, LOW)]
    assert sum(part.double() for part in parts).equal(wide_RC.double())
    if DEVICE.type == "cuda":  # the interpreter cuts where it should round
        assert all(part.equal(vectorised.split(wide_RC, (i,), 0)) for i, part in enumerate(parts))
    apart_RC = torch.cat([wide_RC, wide_RC], 1)[:, shape[1] :]
    for order in ((LOW, MIDDLE, HIGH), (HIGH, HIGH, MIDDLE), (LOW, MIDDLE, HIGH, HIGH)):
        for dim in (0, 1):
            expected = torch.cat([parts[part] for part in order], dim)
            assert kernel.split(wide_RC, order, dim).equal(expected)
            assert kernel.split(apart_RC, order, dim).equal(expected)


@pytest.mark.parametrize(("tokens", "experts", "width", "blocks"), [(1, 1, 1, 1), (63, 8, 100, 1), (48, 5, 257, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_equal_the_reference(tokens, experts, width, blocks, dtype):
    x_TD = draw(0, tokens, width, dtype=torch.bfloat16).requires_grad_()
    weight_ED = (draw(1, experts, width) / 8).to(dtype).requires_grad_()
    grad_TE = draw(2, tokens, experts)
    results = []
    for backend in ("triton", "reference"):
        logits_TE = gate(x_TD, weight_ED, blocks, backend)
        results.append([logits_TE, *torch.autograd.grad(logits_TE, (x_TD, weight_ED), grad_TE)])
    (logits, grad_x, grad_weight), (expected, expected_x, expected_weight) = results
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    # Both are rounded to the dtype of what they are gradients of.
    torch.testing.assert_close(grad_x, expected_x, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(grad_weight, expected_weight, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-4)


def test_a_router_of_bf16_tokens_says_what_the_reference_says():
    results = []
    for backend in ("triton", "reference"):
        router = TopKRouter(40, 6, RouterConfig(top_k=2), backend).to(DEVICE)
        router.load_state_dict({"weight": draw(1, 6, 40), "bias_E": torch.zeros(6)})
        with torch.autocast(DEVICE.type, torch.bfloat16):
            routing = router(draw(0, 9, 40, dtype=torch.bfloat16))
        grads = torch.autograd.grad(routing.weights_TK[:, 0].sum() + routing.logits_TE.sum(), list(router.parameters()))
        results.append([routing.logits_TE, routing.weights_TK, routing.experts_TK, *grads])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


def test_other_dtypes_are_those_of_the_reference():
    half, single, double = torch.float16, torch.float32, torch.float64
    for x_dtype, dtype in ((half, single), (single, single), (torch.bfloat16, double)):
        x_TD, weight_ED = draw(0, 6, 8, dtype=x_dtype), draw(1, 3, 8, dtype=dtype)
        assert gate(x_TD, weight_ED, backend="triton").equal(gate(x_TD, weight_ED, backend="reference"))


@pytest.mark.parametrize("test", OPCHECKS)
def test_operators_pass_torchs_own_check(test):
    x_TD, weight_ED = draw(0, 4, 6, dtype=torch.bfloat16).requires_grad_(), draw(1, 3, 6).requires_grad_()
    ops = torch.ops.wastenot
    torch.library.opcheck(ops.gate.default, (x_TD, weight_ED, 2), test_utils=test)
    detached = (draw(2, 4, 3), x_TD.detach(), weight_ED.detach())
    torch.library.opcheck(ops.gate_backward.default, detached, test_utils=test)
