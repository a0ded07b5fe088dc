"""Triton's scores, selection and slots equal their references; decisions exactly, ties included."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wastenot.kernels.route import assign, choose, select

OPCHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
"""All that torch.library.opcheck looks at, one by one."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = os.environ.get("WASTENOT_GRID") == "full"
examples = settings(max_examples=200 if FULL else 15, deadline=None)
seeds = st.integers(0, 2**31)
# experts, groups, top_groups, k
SHAPES = [(8, 1, 1, 2), (1, 1, 1, 1), (7, 1, 1, 7), (6, 2, 1, 3), (9, 3, 2, 4), (4, 4, 2, 2), (64, 8, 4, 8),
          (256, 8, 4, 8), (200, 1, 1, 8)]  # fmt: skip


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@examples
@given(st.sampled_from([1, 3, 6]), st.sampled_from(SHAPES), seeds, st.booleans())
@example(2, (256, 8, 4, 8), 0, True)
def test_selection_equals_the_reference_also_with_ties(tokens, shape, seed, ties):
    experts, groups, top_groups, k = shape
    scores_TE = draw(seed, tokens, experts)
    if ties:
        scores_TE = scores_TE.round()
    found, expected = (select(scores_TE, k, groups, top_groups, backend=b) for b in ("triton", "reference"))
    assert found.equal(expected)


@examples
@given(
    st.sampled_from([1, 3]), st.sampled_from(SHAPES), st.sampled_from(["softmax", "sigmoid"]), seeds, st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_scores_and_their_gradient_equal_the_reference(tokens, shape, score, seed, biased, dtype):
    experts, groups, top_groups, k = shape
    logits_TE = (5 * draw(seed, tokens, experts, dtype=dtype)).requires_grad_()
    bias_E = draw(seed + 1, experts) if biased else None
    results = []
    for backend in ("triton", "reference"):
        scores_TE, chosen_TK = choose(logits_TE, k, score, groups, top_groups, bias_E, backend)
        weight = torch.linspace(-1, 1, scores_TE.numel(), dtype=dtype, device=DEVICE).view_as(scores_TE)
        results.append([scores_TE, *torch.autograd.grad(scores_TE, logits_TE, weight)])
        steered_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E.to(dtype)
        # Of its own scores: those of two implementations differ in the last bit.
        assert chosen_TK.equal(select(steered_TE, k, groups, top_groups, backend="reference"))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under the interpreter
def test_logits_that_are_not_numbers_choose_experts_that_exist():
    logits_TE = torch.tensor([[torch.nan] * 5, [1.0, torch.nan, 3.0, 2.0, -torch.inf]], device=DEVICE)
    for groups, top_groups in ((1, 1), (5, 3)):
        _, chosen_TK = choose(logits_TE, 3, "softmax", groups, top_groups, backend="triton")
        assert ((chosen_TK >= 0) & (chosen_TK < 5)).all()
    assert select(logits_TE, 3, backend="triton")[1].tolist() == [2, 3, 0], "what is not a number is chosen last"


@examples
@given(st.sampled_from([1, 2, 3, 25, 100]), st.integers(1, 3), st.sampled_from([1, 2, 5, 17, 256]),
       st.sampled_from([1, 2, 8]), seeds, st.data())  # fmt: skip
def test_slots_equal_the_reference(size, blocks, experts, k, seed, data):
    capacity = data.draw(st.integers(0, max(1, 2 * size * k // experts)))
    k = min(k, experts)
    scores_TE = draw(seed, size * blocks, experts).round(decimals=1)
    experts_TK = select(scores_TE, k, backend="reference")
    priority_T = (10 * scores_TE.amax(-1)).int()
    found, expected = (assign(experts_TK, priority_T, experts, blocks, capacity, b) for b in ("triton", "reference"))
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])


@pytest.mark.parametrize("capacity", [0, 7, 1000])
def test_slots_where_all_tokens_want_one_expert(capacity):
    experts_TK = torch.full((150, 1), 3, device=DEVICE)
    priority_T = torch.arange(150, device=DEVICE, dtype=torch.int32) % 10
    found, expected = (assign(experts_TK, priority_T, 8, 2, capacity, b) for b in ("triton", "reference"))
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])


@examples
@given(st.sampled_from([1, 3, 100]), st.integers(1, 3), st.sampled_from([1, 5, 17]), st.integers(1, 4), seeds)
def test_dropless_slots_number_every_queue_without_gaps(size, blocks, experts, k, seed):
    k = min(k, experts)
    experts_TK = select(draw(seed, size * blocks, experts), k, backend="reference")
    nobody_first = torch.zeros(size * blocks, dtype=torch.int32, device=DEVICE)
    slots_TK, counts_BE = assign(experts_TK, nobody_first, experts, blocks, None, "triton")
    block_T1 = (torch.arange(size * blocks, device=DEVICE) // size).unsqueeze(1).expand_as(experts_TK)
    for block in range(blocks):
        for expert in range(experts):
            queue = slots_TK[(block_T1 == block) & (experts_TK == expert)].sort().values
            assert queue.tolist() == list(range(int(counts_BE[block, expert])))


@pytest.mark.parametrize("test", OPCHECKS)
def test_operators_pass_torchs_own_check(test):
    logits_TE = draw(0, 3, 6).requires_grad_()
    _, chosen_TK = choose(logits_TE, 2, backend="triton")  # registers
    torch.library.opcheck(torch.ops.wastenot.choose.default, (logits_TE, None, 2, "sigmoid", 2, 1), test_utils=test)
    priority_T = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.wastenot.assign.default, (chosen_TK, priority_T, 6, 1, 1), test_utils=test)
