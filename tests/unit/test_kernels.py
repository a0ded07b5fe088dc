"""Every kernel equals its reference, forward and backward, at sizes chosen to break it."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.kernels.combine import combine
from wastenot.kernels.cross_entropy import linear_cross_entropy, vectorised
from wastenot.kernels.dispatch import permute, reorder
from wastenot.kernels.gate import gate
from wastenot.kernels.gate import vectorised as gate_in_parts
from wastenot.kernels.grouped_mm import grouped_swiglu
from wastenot.kernels.norm import rms_norm
from wastenot.kernels.route import assign, choose, select
from wastenot.kernels.weigh import weigh

FULL = os.environ.get("WASTENOT_GRID") == "full"
examples = settings(max_examples=300 if FULL else 40, deadline=None)

sizes = st.sampled_from([1, 2, 3, 8, 63, 100, 257])
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weight).sum(), inputs))


def test_three_parts_of_bf16_hold_every_bit_of_fp32():
    wide = draw(0, 50, 7, dtype=torch.float32) * torch.logspace(-30, 30, 50).unsqueeze(1)
    high, middle, low = gate_in_parts.split(wide, (0, 1, 2), 1).double().chunk(3, 1)
    assert (high + middle + low).equal(wide.double())
    assert (middle.abs() <= 2**-8 * high.abs()).all()
    assert (low.abs() <= 2**-8 * middle.abs()).all()
    assert gate_in_parts.split(wide, (2, 0), 0).double().equal(torch.cat([low, high]))


@examples
@given(st.sampled_from([0, 1, 63, 100]), st.sampled_from([1, 5, 64]), st.sampled_from([1, 100, 257]), seeds)
def test_logits_in_parts_equal_the_reference(tokens, experts, width, seed):
    x_TD = draw(seed, tokens, width, dtype=torch.bfloat16).requires_grad_()
    weight_ED = draw(seed + 1, experts, width, dtype=torch.float32).requires_grad_()
    expected_TE = gate(x_TD.double(), weight_ED.double(), backend="reference")
    expected = [expected_TE, *gradients(expected_TE, x_TD, weight_ED)]
    found_TE = gate_in_parts.gate(x_TD, weight_ED, 1)
    logits, grad_x, grad_weight = found_TE, *gradients(found_TE, x_TD, weight_ED)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected[0], rtol=1e-5, atol=1e-4)
    # Rounded once, as the reference's is.
    torch.testing.assert_close(grad_x, expected[1], rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(grad_weight, expected[2], rtol=1e-5, atol=1e-4)


def test_logits_of_a_block_are_those_of_its_tokens_alone():
    x_TD, weight_ED = draw(0, 12, 33, dtype=torch.bfloat16), draw(1, 5, 33, dtype=torch.float32)
    for function in (gate, gate_in_parts.gate):
        together_TE = function(x_TD, weight_ED, 3)
        assert together_TE.equal(torch.cat([function(block, weight_ED, 1) for block in x_TD.chunk(3)]))


@examples
@given(sizes, st.integers(1, 64), st.integers(1, 8), seeds, st.booleans())
def test_selection_equals_reference_also_with_ties(tokens, experts, k, seed, ties):
    k = min(k, experts)
    scores_TE = draw(seed, tokens, experts)
    if ties:
        scores_TE = scores_TE.round()
    assert select(scores_TE, k).equal(select(scores_TE, k, backend="reference"))


@examples
@given(sizes, st.sampled_from([(8, 4, 2, 4), (8, 8, 3, 3), (64, 8, 4, 8), (6, 2, 1, 2), (6, 2, 1, 3)]), seeds)
def test_group_limited_selection_stays_in_groups(tokens, shape, seed):
    experts, groups, top_groups, k = shape
    scores_TE = draw(seed, tokens, experts)
    chosen = select(scores_TE, k, groups, top_groups)
    assert chosen.equal(select(scores_TE, k, groups, top_groups, backend="reference"))
    used = [len(set((row // (experts // groups)).tolist())) for row in chosen]
    assert max(used) <= top_groups
    assert all(len(set(row.tolist())) == k for row in chosen), "an expert was chosen twice"


def test_equal_scores_go_to_the_lowest_indices():
    assert select(torch.ones(3, 7), 4).tolist() == [[0, 1, 2, 3]] * 3


@examples
@given(st.sampled_from([1, 2, 3, 25, 100]), st.integers(1, 3), st.integers(1, 17), st.integers(1, 4), seeds, st.data())
def test_slots_equal_reference(size, blocks, experts, k, seed, data):
    capacity = data.draw(st.integers(0, max(1, 2 * size * k // experts)))
    k = min(k, experts)
    tokens = size * blocks
    scores_TE = draw(seed, tokens, experts).round(decimals=1)
    experts_TK = select(scores_TE, k)
    priority_T = scores_TE.amax(-1)
    slots, counts = assign(experts_TK, priority_T, experts, blocks, capacity)
    expected_slots, expected_counts = assign(experts_TK, priority_T, experts, blocks, capacity, backend="reference")
    assert slots.equal(expected_slots)
    assert counts.equal(expected_counts)


@examples
@given(st.sampled_from([1, 2, 3, 25, 100]), st.integers(1, 3), st.integers(1, 17), st.integers(1, 4), seeds)
def test_dropless_slots_number_every_queue_without_gaps(size, blocks, experts, k, seed):
    k = min(k, experts)
    experts_TK = select(draw(seed, size * blocks, experts), k)
    slots, counts = assign(experts_TK, torch.zeros(size * blocks), experts, blocks)
    _, expected = assign(experts_TK, torch.zeros(size * blocks), experts, blocks, backend="reference")
    assert counts.equal(expected)
    block_T1 = (torch.arange(size * blocks) // size).unsqueeze(1).expand_as(experts_TK)
    for block in range(blocks):
        for expert in range(experts):
            queue = slots[(block_T1 == block) & (experts_TK == expert)].sort().values
            assert queue.equal(torch.arange(counts[block, expert])), "slots must be 0, 1, 2 ..."


def test_priority_decides_who_is_dropped():
    # Four tokens want expert 0, two slots: tokens 1 and 3 have the highest priority, then the tie goes by index.
    experts_TK = torch.zeros(4, 1, dtype=torch.int64)
    slots, counts = assign(experts_TK, torch.tensor([0.1, 0.9, 0.1, 0.5]), 2, 1, capacity=3)
    assert slots.flatten().tolist() == [2, 0, -1, 1]
    assert counts.tolist() == [[3, 0]]


def test_first_choices_come_before_any_second_choice():
    # Token 0 (highest priority) has expert 1 as its second choice; tokens 1 and 2 as their first.
    experts_TK = torch.tensor([[0, 1], [1, 0], [1, 0]])
    slots, _ = assign(experts_TK, torch.tensor([0.9, 0.2, 0.1]), 2, 1, capacity=2)
    assert slots.tolist() == [[0, -1], [0, 1], [1, -1]]


def rows_of(tokens: int, k: int, seed: int, dropped: bool, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random placement of T*k choices in rows, some dropped, some rows empty; and its inverse."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.randperm(tokens * k + padding, generator=generator)[: tokens * k]
    num_rows = tokens * k + padding
    if dropped:
        position = torch.where(torch.rand(tokens * k, generator=generator) < 0.3, -1, position)
    source = torch.full((num_rows,), -1, dtype=torch.int64)
    kept = position >= 0
    source[position[kept]] = torch.arange(tokens).repeat_interleave(k)[kept]
    return position.view(tokens, k), source


@examples
@given(sizes, st.integers(1, 4), st.integers(1, 33), seeds, st.booleans(), st.integers(0, 5))
def test_permute_and_combine_equal_reference(tokens, k, width, seed, dropped, padding):
    position_TK, source_R = rows_of(tokens, k, seed, dropped, padding)
    partial = dropped or padding > 0
    x_TD = draw(seed, tokens, width).requires_grad_()
    results = []
    for backend in ("auto", "reference"):
        rows_RD = permute(x_TD, source_R, position_TK, partial, backend=backend)
        results.append([rows_RD, *gradients(rows_RD, x_TD)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert (results[0][0][source_R < 0] == 0).all(), "padding rows are zero"

    rows_RD = draw(seed + 1, source_R.numel(), width).requires_grad_()
    weights_TK = draw(seed + 2, tokens, k).requires_grad_()
    results = []
    for backend in ("auto", "reference"):
        y_TD = combine(rows_RD, weights_TK, position_TK, source_R, partial, backend=backend)
        results.append([y_TD, *gradients(y_TD, rows_RD, weights_TK)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_combine_of_dispatch_is_identity():
    position_TK, source_R = rows_of(50, 2, 0, dropped=False, padding=7)
    x_TD = draw(0, 50, 8)
    rows_RD = permute(x_TD, source_R, position_TK)
    y_TD = combine(rows_RD, torch.full((50, 2), 0.5, dtype=torch.float64), position_TK, source_R)
    torch.testing.assert_close(y_TD, x_TD)


def test_combine_of_bf16_rows_sums_in_fp32():
    position_TK, source_R = torch.tensor([[0, 1, 2]]), torch.tensor([0, 0, 0])
    rows_RD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    y_TD = combine(rows_RD, torch.ones(1, 3), position_TK, source_R)
    assert y_TD.item() == 258, "256 + 1 is 256 in bfloat16"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_everything_dropped_gives_zero_and_finite_gradients(backend):
    position_TK = torch.full((3, 2), -1)
    rows_RD = torch.zeros(0, 4, requires_grad=True)
    weights_TK = torch.ones(3, 2, requires_grad=True)
    y_TD = combine(rows_RD, weights_TK, position_TK, torch.zeros(0, dtype=torch.int64), backend=backend)
    assert y_TD.tolist() == [[0.0] * 4] * 3
    y_TD.sum().backward()
    assert weights_TK.grad is not None
    assert weights_TK.grad.eq(0).all()


@examples
@given(sizes, seeds)
def test_reorder_and_its_gradient_equal_reference(rows, seed):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    inverse = order.argsort()
    x = draw(seed, rows, 3).requires_grad_()
    fast, plain = reorder(x, order, inverse), reorder(x, order, inverse, backend="reference")
    assert fast.equal(plain)
    assert gradients(fast, x)[0].equal(gradients(plain, x)[0])


GROUPS = [[0], [5], [3, 0, 4], [0, 0, 9], [1] * 16, [2, 5, 0, 3], [1, 16, 2, 9], [40, 30], [64, 96], [63, 0, 1, 100]]


@pytest.mark.parametrize("sizes_e", GROUPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_grouped_experts_equal_reference(sizes_e, dtype, tolerance):
    D, F, e, R = 24, 40, len(sizes_e), sum(sizes_e)
    offsets_e = torch.tensor(sizes_e).cumsum(0).to(torch.int32)
    x, gate_up, down = draw(0, R, D, dtype=dtype), draw(1, e, 2 * F, D, dtype=dtype), draw(2, e, D, F, dtype=dtype)
    results = []
    for backend in ("torch", "reference"):
        inputs = [t.clone().requires_grad_() for t in (x, gate_up, down)]
        y = grouped_swiglu(*inputs, offsets_e, backend=backend)
        results.append([y, *gradients(y, *inputs)])
    for fast, plain in zip(*results, strict=True):
        scale = plain.abs().max().item() if plain.numel() else 1.0
        torch.testing.assert_close(fast, plain, rtol=0, atol=tolerance * max(scale, 1.0))


def test_grouped_experts_take_expanded_gradients():
    inputs = [
        draw(i, *shape, dtype=torch.float32).requires_grad_() for i, shape in enumerate([(6, 8), (2, 16, 8), (2, 8, 8)])
    ]
    grouped_swiglu(*inputs, torch.tensor([2, 6], dtype=torch.int32)).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)


def test_reference_experts_pass_gradcheck():
    inputs = [draw(i, *shape).requires_grad_() for i, shape in enumerate([(5, 4), (3, 6, 4), (3, 4, 3)])]
    offsets_e = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *t: grouped_swiglu(*t, offsets_e, backend="reference"), inputs)


def test_unsupported_widths_fall_back_or_are_refused():
    x, gate_up, down = draw(0, 4, 6).float(), draw(1, 1, 10, 6).float(), draw(2, 1, 6, 5).float()
    offsets_e = torch.tensor([4], dtype=torch.int32)
    assert grouped_swiglu(x, gate_up, down, offsets_e).shape == (4, 6)
    with pytest.raises(ValueError, match="16 bytes"):
        grouped_swiglu(x, gate_up, down, offsets_e, backend="torch")


@examples
@given(sizes, st.sampled_from([1, 7, 300]), seeds, st.booleans())
def test_chunked_cross_entropy_equals_reference(tokens, vocab, seed, some_ignored):
    hidden = draw(seed, tokens, 5).requires_grad_()
    weight = draw(seed + 1, vocab, 5).requires_grad_()
    target = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    if some_ignored:
        target[::2] = -100
    results = []
    for backend in ("auto", "reference"):
        loss = linear_cross_entropy(hidden, weight, target, backend=backend)
        results.append([loss, *torch.autograd.grad(2.5 * loss, (hidden, weight))])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_cross_entropy_chunks_do_not_change_the_result(monkeypatch):
    hidden, weight = draw(0, 50, 8).requires_grad_(), draw(1, 33, 8)
    target = torch.arange(50) % 33
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), hidden)[0]
    monkeypatch.setattr(vectorised, "CHUNK_BYTES", 8 * 33 * 7)
    cut = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), hidden)[0]
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


def test_cross_entropy_survives_huge_logits():
    hidden = torch.tensor([[1e4]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(2e4)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@examples
@given(sizes, st.sampled_from([1, 5, 64]), seeds, st.floats(1e-3, 1e3))
def test_rms_norm_equals_reference(rows, width, seed, scale):
    x = (draw(seed, 2, rows, width) * scale).requires_grad_()
    weight = draw(seed + 1, width).requires_grad_()
    results = []
    for backend in ("auto", "reference"):
        y = rms_norm(x, weight, 1e-6, backend=backend)
        results.append([y, *gradients(y, x, weight)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_rms_norm_passes_gradcheck():
    x, weight = draw(0, 3, 6).requires_grad_(), draw(1, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))


def test_combine_keeps_its_dtype_under_autocast():
    rows = draw(0, 6, 8, dtype=torch.float32)
    weights = draw(1, 3, 2, dtype=torch.float32)
    position, source = torch.arange(6).view(3, 2), torch.arange(6) // 2
    plain = combine(rows, weights, position, source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert combine(rows, weights, position, source).equal(plain)


def test_reference_rows_and_weights_pass_gradcheck():
    position_TK, source_R = rows_of(4, 2, 0, dropped=True, padding=2)
    x_TD, rows_RD = draw(0, 4, 3).requires_grad_(), draw(1, source_R.numel(), 3).requires_grad_()
    weights_TK = draw(2, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: permute(x, source_R, position_TK, backend="reference"), x_TD)
    assert torch.autograd.gradcheck(
        lambda rows, weights: combine(rows, weights, position_TK, source_R, backend="reference"), (rows_RD, weights_TK)
    )
    logits_TE = draw(3, 4, 5).requires_grad_()
    experts_TK, times_TK = torch.tensor([[0, 4, 2]] * 4), torch.tensor([[1, 0, 2], [1, 1, 0], [0, 0, 3], [0, 0, 0]])
    for score in ("softmax", "sigmoid"):
        # What is detached is a constant there: see tests/papers.
        assert torch.autograd.gradcheck(
            lambda z, score=score: weigh(z, experts_TK, times_TK, score, detach=False, always_counted=1), logits_TE
        )
        assert torch.autograd.gradcheck(
            lambda z, score=score: choose(z, 2, score, backend="reference")[0].square(), logits_TE
        )
