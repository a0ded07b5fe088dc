"""The loss against a teacher: what autograd makes of whole logits, and plain cross-entropy where it has no part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.kernels.cross_entropy import linear_cross_entropy
from wastenot.kernels.distillation import linear_distillation, vectorised

pytestmark = pytest.mark.usefixtures("one_thread")

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def case(seed: int, tokens: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Student and teacher of other widths, and targets of which some count nothing."""
    shapes = (tokens, 5), (vocab, 5), (tokens, 3), (vocab, 3)
    hidden, weight, *teacher = (draw(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    targets[::3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), *teacher, targets


def test_hand_computed():
    # Logits ln 3, 0 against a teacher's 0, 0: probabilities 3/4, 1/4 against 1/2, 1/2.
    hidden, weight = torch.tensor([[3.0]]).log(), torch.tensor([[1.0], [0.0]])
    loss, nats, divergence = linear_distillation(hidden, weight, torch.zeros(1, 1), weight, torch.tensor([0]), 0.25, 1)
    # -ln 3/4, and 1/2 ln(1/2 / 3/4) + 1/2 ln(1/2 / 1/4).
    torch.testing.assert_close(nats, torch.tensor(4 / 3).log())
    torch.testing.assert_close(divergence, 0.5 * torch.tensor(4 / 3).log())
    torch.testing.assert_close(loss, 0.75 * nats + 0.25 * divergence)


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([1, 63, 100]), st.sampled_from([1, 7, 300]), st.sampled_from([0.0, 0.3, 1.0]))
def test_chunks_equal_reference(seed, tokens, vocab, mix):
    inputs = case(seed, tokens, vocab)
    results = []
    for backend in ("auto", "reference"):
        loss, *parts = linear_distillation(*inputs, mix, 2.5, backend=backend)
        assert not any(part.requires_grad for part in parts)
        results.append([loss, *parts, *torch.autograd.grad(2.5 * loss, inputs[:2])])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_those_of_finite_differences(backend):
    hidden, weight, *rest = case(0, 4, 6)
    assert torch.autograd.gradcheck(
        lambda *own: linear_distillation(*own, *rest, 0.6, 1.7, backend=backend)[0], (hidden, weight)
    )


def test_chunks_do_not_change_the_result(monkeypatch):
    inputs = case(1, 50, 33)
    whole = torch.autograd.grad(linear_distillation(*inputs, 0.5, 2.0)[0], inputs[:2])
    monkeypatch.setattr(vectorised, "CHUNK_BYTES", 8 * 33 * 7)
    cut = torch.autograd.grad(linear_distillation(*inputs, 0.5, 2.0)[0], inputs[:2])
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_a_part_in_the_loss_it_is_cross_entropy_bit_for_bit(dtype):
    hidden, weight, *rest, targets = case(2, 100, 300, dtype)
    loss, nats, _ = linear_distillation(hidden, weight, *rest, targets, 0.0, 2.0)
    plain = linear_cross_entropy(hidden, weight, targets)
    assert loss.equal(plain) and nats.equal(plain)
    own, expected = (torch.autograd.grad(each, (hidden, weight)) for each in (loss, plain))
    assert own[0].equal(expected[0]) and own[1].equal(expected[1])


def test_a_student_that_is_its_teacher_learns_nothing_from_it():
    hidden, weight, *_, targets = case(3, 100, 300)
    loss, _, divergence = linear_distillation(hidden, weight, hidden.detach(), weight.detach(), targets, 1.0, 3.0)
    assert loss.item() == 0 and divergence.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_a_frozen_output_layer_has_no_gradient_and_the_hidden_states_theirs():
    hidden, weight, *rest = case(4, 10, 7)
    both = torch.autograd.grad(linear_distillation(hidden, weight, *rest, 0.5, 2.0)[0], (hidden, weight))
    for frozen, learning, expected in ((weight, hidden, both[0]), (hidden, weight, both[1])):
        pair = (hidden, weight.detach()) if frozen is weight else (hidden.detach(), weight)
        loss = linear_distillation(*pair, *rest, 0.5, 2.0)[0]
        assert torch.autograd.grad(loss, learning)[0].equal(expected)
        plain = linear_cross_entropy(*pair, rest[-1])
        grad = torch.autograd.grad(plain, learning)[0]
        assert grad.equal(torch.autograd.grad(linear_cross_entropy(hidden, weight, rest[-1]), learning)[0])


def test_huge_logits_stay_finite():
    weight, taught = torch.tensor([[1e4], [-1e4]], requires_grad=True), torch.tensor([[-1e4], [1e4]])
    loss, _, divergence = linear_distillation(
        torch.ones(1, 1), weight, torch.ones(1, 1), taught, torch.tensor([1]), 1, 1
    )
    assert divergence.item() == pytest.approx(2e4)
    loss.backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
