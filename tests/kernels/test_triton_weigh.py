"""Triton's combine weights equal their reference, forward and backward."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wastenot.kernels.weigh import weigh

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = os.environ.get("WASTENOT_GRID") == "full"
examples = settings(max_examples=300 if FULL else 30, deadline=None)


@examples
@given(
    st.sampled_from([1, 3]), st.sampled_from([(1, 1), (7, 1), (7, 3), (64, 8), (256, 9)]),
    st.sampled_from(["softmax", "sigmoid"]), st.booleans(), st.booleans(), st.sampled_from([0, 2]),
    st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31),
)  # fmt: skip
@example(3, (7, 3), "softmax", True, False, 2, False, torch.float64, 0)
@example(3, (7, 3), "softmax", True, True, 0, True, torch.float32, 0)
def test_weights_and_their_gradient_equal_the_reference(
    tokens, shape, score, normalize, detach, always_counted, once, dtype, seed
):
    experts, k = shape
    draw = torch.Generator().manual_seed(seed)
    logits_TE = (4 * torch.randn(tokens, experts, generator=draw)).to(DEVICE, dtype).requires_grad_()
    experts_TK = torch.stack([torch.randperm(experts, generator=draw)[:k] for _ in range(tokens)]).to(DEVICE)
    some_TK = torch.randint(0, 3, (tokens, k), generator=draw).to(DEVICE)
    some_TK[0] = 0
    times_TK = None if once else some_TK
    grad_TK = torch.randn(tokens, k, generator=draw).to(DEVICE, dtype)
    results = []
    for backend in ("triton", "reference"):
        weights_TK = weigh(logits_TE, experts_TK, times_TK, score, normalize, detach, always_counted, backend)
        results.append([weights_TK, *torch.autograd.grad(weights_TK, logits_TE, grad_TK)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    served_TK = torch.ones_like(some_TK) if once else some_TK
    assert (results[0][0][served_TK == 0] == 0).all()
    if k == 1 and normalize:
        assert (results[0][0][served_TK > 0] == 1).all()


def test_a_lost_choice_of_any_probability_leaves_gradients_finite():
    logits_TE = torch.tensor([[0.0, -200.0, -250.0]], device=DEVICE, requires_grad=True)
    experts_TK, times_TK = torch.tensor([[0, 1]], device=DEVICE), torch.tensor([[0, 1]], device=DEVICE)
    weights_TK = weigh(logits_TE, experts_TK, times_TK, backend="triton")
    assert weights_TK.tolist() == [[0, 1]]
    assert torch.autograd.grad(weights_TK.sum(), logits_TE)[0].tolist() == [[-1, 1, 0]]


OPCHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


@pytest.mark.parametrize("test", OPCHECKS)
def test_operators_pass_torchs_own_check(test):
    logits_TE = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    experts_TK = torch.tensor([[0, 1], [4, 2], [3, 0]], device=DEVICE)
    arguments = (logits_TE, experts_TK, torch.ones_like(experts_TK), "softmax", True, True, 0)
    weigh(*arguments, backend="triton")  # registers
    torch.library.opcheck(torch.ops.wastenot.weigh.default, arguments, test_utils=test)
