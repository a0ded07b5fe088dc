"""Expert Slimming: the right weights go, as many as were asked for, and the rest makes up for them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wastenot.moe.compress.plan import Method, Pattern, Slim
from wastenot.moe.compress.slim import ExpertSums, kept, slim
from wastenot.moe.compress.sparsegpt import prune, sweep

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS: tuple[Method, ...] = ("magnitude", "wanda", "sparsegpt")
PATTERNS: tuple[Pattern, ...] = ("unstructured", "2:4", "4:8")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(inputs: int, tokens: int, seed: int = 0) -> Tensor:
    """[inputs, tokens], of which each is mostly what a few others are, at widely different sizes."""
    mixed = drawn(inputs, inputs // 4, seed=seed) @ drawn(inputs // 4, tokens, seed=seed + 1)
    sizes = drawn(inputs, 1, seed=seed + 2).exp()
    return sizes * (mixed + 0.3 * drawn(inputs, tokens, seed=seed + 3))


def sums_for(method: Method, x_IN: Tensor) -> Tensor | None:
    return {"magnitude": None, "wanda": x_IN.square().sum(1), "sparsegpt": x_IN @ x_IN.T}[method]


def test_d1_magnitude_keeps_the_largest() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, -3.0], [0.5, 0.1, -0.2, 0.05]])
    expected = torch.tensor([[0.0, -4.0, 0.0, -3.0], [0.5, 0.0, -0.2, 0.0]])
    for pattern in ("unstructured", "2:4"):
        torch.testing.assert_close(slim(weight, Slim(method="magnitude", pattern=pattern)), expected)


def test_wanda_weighs_by_what_comes_in() -> None:
    """|w| alone would keep the first two; the third input is ten times as large, the others are silent."""
    weight, x_IN = torch.tensor([[3.0, 2.0, 1.0, 0.5]]), torch.tensor([[1.0], [0.1], [10.0], [0.1]])
    found = slim(weight, Slim(method="wanda"), x_IN.square().sum(1))
    torch.testing.assert_close(found, torch.tensor([[3.0, 0.0, 1.0, 0.0]]))


def test_d5_wanda_adds_squares_and_never_roots() -> None:
    """Input 0 is 3 on each of two ranks, input 1 is 4.5 on one. Of squares 18 < 20.25; of roots 6 > 4.5."""
    ranks = [torch.tensor([9.0, 20.25]), torch.tensor([9.0, 0.0])]
    found = slim(torch.ones(1, 2), Slim(method="wanda"), torch.stack(ranks).sum(0))
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0]]))


def test_of_equal_scores_the_lower_index_goes() -> None:
    assert kept(torch.ones(1, 8), "unstructured", 0.25).tolist() == [[False, False, *[True] * 6]]
    assert kept(torch.ones(1, 8), "2:4", 0.5).tolist() == [[False, False, True, True] * 2]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    eighths=st.integers(1, 6),
    sparsity=st.floats(0.01, 0.99),
    pattern=st.sampled_from(PATTERNS),
    values=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_exactly_as_many_go_as_were_asked_for(
    rows: int, eighths: int, sparsity: float, pattern: Pattern, values: int, seed: int
) -> None:
    """With few different values there are many ties; none that goes is worth more than one that stays."""
    inputs = 8 * eighths
    scores = torch.randint(0, values, (2, rows, inputs), generator=torch.Generator().manual_seed(seed)).double()
    stay = kept(scores, pattern, sparsity)
    n, m = (round(sparsity * inputs), inputs) if pattern == "unstructured" else tuple(map(int, pattern.split(":")))
    grouped = (~stay).unflatten(-1, (-1, m))
    assert (grouped.sum(-1) == n).all()
    worst = scores.unflatten(-1, (-1, m)).masked_fill(grouped, torch.inf).amin(-1)
    best = scores.unflatten(-1, (-1, m)).masked_fill(~grouped, -torch.inf).amax(-1)
    assert (best <= worst).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_a_stack_is_slimmed_matrix_by_matrix(method: Method, pattern: Pattern) -> None:
    how = Slim(method=method, pattern=pattern)
    stack, inputs = drawn(3, 12, 32), [correlated(32, 100, seed) for seed in (0, 10, 20)]
    sums = [sums_for(method, x_IN) for x_IN in inputs]
    found = slim(stack, how, None if sums[0] is None else torch.stack([each for each in sums if each is not None]))
    for one, weight, each in zip(found, stack, sums, strict=True):
        assert torch.equal(one, slim(weight, how, each))
        assert (one == 0).sum() == weight.numel() // 2


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_loses_less_than_wanda_which_loses_less_than_magnitude(pattern: Pattern, seed: int) -> None:
    weight, x_IN = drawn(24, 64, seed=seed), correlated(64, 400, seed)
    loss = {
        method: ((slim(weight, Slim(method=method, pattern=pattern), sums_for(method, x_IN)) - weight) @ x_IN).norm()
        for method in METHODS
    }
    assert loss["sparsegpt"] < loss["wanda"] < loss["magnitude"]


class First:
    """The first column of all goes, the others stay as they come."""

    cost: Tensor | None = None

    def settle(self, block_OB: Tensor, importance_B: Tensor, column: int) -> Tensor:
        if self.cost is not None:
            return block_OB[:, column]
        self.cost = importance_B[0]
        return torch.zeros_like(block_OB[:, 0])


@pytest.mark.parametrize("block", [3, 12])
def test_what_stays_makes_up_for_a_column_as_well_as_least_squares_can(block: int) -> None:
    weight, x_IN = drawn(5, 12), correlated(12, 50)
    rule = First()
    found = sweep(weight, x_IN @ x_IN.T, rule, block=block, damping=0.0)
    best = torch.linalg.lstsq(x_IN[1:].T, (weight @ x_IN).T).solution.T
    torch.testing.assert_close(found, torch.cat([torch.zeros(5, 1, dtype=torch.float64), best], 1))
    cost = (found - weight) @ x_IN
    torch.testing.assert_close(cost.square().sum(1), weight[:, 0].square() * rule.cost)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_over_unrelated_inputs_sparsegpt_is_magnitude(pattern: Pattern) -> None:
    weight = drawn(6, 32)
    found = prune(weight, 7 * torch.eye(32, dtype=torch.float64), Slim(method="sparsegpt", pattern=pattern))
    torch.testing.assert_close(found, slim(weight, Slim(method="magnitude", pattern=pattern)))


def test_over_unrelated_inputs_unstructured_sparsegpt_is_magnitude_over_a_block_of_columns() -> None:
    weight = drawn(6, 32)
    found = prune(weight, torch.eye(32, dtype=torch.float64), Slim(method="sparsegpt", sparsity=0.4), block=16)
    for columns in (slice(0, 16), slice(16, 32)):
        part = weight[:, columns]
        limit = part.abs().flatten().sort().values[round(0.4 * part.numel())]
        torch.testing.assert_close(found[:, columns], part * (part.abs() >= limit))


def test_blocks_of_columns_change_where_work_is_done_and_no_result() -> None:
    weight, x_IN = drawn(8, 64), correlated(64, 300)
    found = [prune(weight, x_IN @ x_IN.T, Slim(method="sparsegpt", pattern="2:4"), block=size) for size in (4, 16, 64)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def expert_sums(method: Method, x_eIN: list[Tensor], h_eFN: list[Tensor]) -> ExpertSums | None:
    """Of experts that read x and whose hidden units were h; one with no token has zeros."""
    if method == "magnitude":
        return None
    inputs, hidden = ([sums_for(method, each) for each in tokens] for tokens in (x_eIN, h_eFN))
    return ExpertSums(torch.tensor([x.size(1) for x in x_eIN]), inputs.__getitem__, hidden.__getitem__)  # type: ignore[arg-type]


def slimmed(stack: Tensor, weight: str, how: Slim, sums: ExpertSums | None) -> Tensor:
    return torch.stack([slim(each, how, sums and sums(expert, weight)) for expert, each in enumerate(stack)])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_d6_experts_are_slimmed_by_their_own_tokens_and_one_without_by_its_layers(
    method: Method, pattern: Pattern
) -> None:
    gate_up, down = drawn(3, 32, 24, seed=1), drawn(3, 24, 16, seed=2)
    tokens = [200, 0, 5]
    x = [correlated(24, 200, seed)[:, :count] for seed, count in enumerate(tokens)]
    h = [correlated(16, 200, seed + 9)[:, :count] for seed, count in enumerate(tokens)]
    how = Slim(method=method, pattern=pattern)
    sums = expert_sums(method, x, h)
    new_gate_up, new_down = slimmed(gate_up, "gate_up", how, sums), slimmed(down, "down", how, sums)
    for new, old in ((new_gate_up, gate_up), (new_down, down)):
        assert new.isfinite().all()
        assert ((new == 0).sum((1, 2)) == old[0].numel() // 2).all()
    # Enough tokens: nobody else's count.
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(new_gate_up[0], slim(gate_up[0], how, sums_for(method, x[0])))
    close(new_down[0], slim(down[0], how, sums_for(method, h[0])))
    # None: those of all.
    close(new_gate_up[1], slim(gate_up[1], how, sums_for(method, torch.cat(x, 1))))
    if sums is not None:
        assert [sums.is_starved(e, weight) for e in range(3) for weight in ("gate", "down")] == [False] * 2 + [True] * 4
        torch.testing.assert_close(sums(2, "up").diagonal() if method == "sparsegpt" else sums(2, "up"), moved(x[2], x))


def moved(own_IN: Tensor, all_IN: list[Tensor]) -> Tensor:
    """(N H + tau P) / (N + tau) by hand, of squares, times the N + tau tokens it stands for."""
    pool = torch.cat(all_IN, 1).square().mean(1)
    return own_IN.size(1) * own_IN.square().mean(1) + len(own_IN) * pool


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_hidden_units_of_a_starved_expert_are_moved_towards_being_alike(method: Method) -> None:
    """What others' hidden units do says nothing about its own."""
    h = [correlated(16, 200)[:, :count] for count in (200, 0)]
    sums = expert_sums(method, h, h)
    assert sums is not None
    found = sums(1, "down")
    expected = torch.ones(16, dtype=torch.float64) * 16 * h[0].square().mean()
    torch.testing.assert_close(found, expected if method == "wanda" else expected.diag(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_layer_that_saw_no_token_is_slimmed_by_magnitude(method: Method) -> None:
    gate_up, down, how = drawn(2, 8, 16), drawn(2, 16, 8), Slim(method=method, pattern="2:4")
    none = [torch.zeros(16, 0, dtype=torch.float64)] * 2
    empty = expert_sums(method, none, [each[:8] for each in none])
    magnitude = Slim(method="magnitude", pattern="2:4")
    for stack, weight in ((gate_up, "gate_up"), (down, "down")):
        torch.testing.assert_close(slimmed(stack, weight, how, empty), slimmed(stack, weight, magnitude, None))


def test_what_is_missing_or_no_number_is_refused() -> None:
    weight = torch.ones(2, 6)
    with pytest.raises(ValueError, match="2:4 does not fit rows of 6 inputs; use unstructured"):
        slim(weight, Slim(method="magnitude", pattern="2:4"))
    with pytest.raises(ValueError, match="2:4 does not fit rows of 6 inputs; use unstructured"):
        slim(weight, Slim(method="sparsegpt", pattern="2:4"), torch.eye(6))
    with pytest.raises(ValueError, match="a weight is not a number"):
        slim(weight * torch.nan, Slim(method="sparsegpt"), torch.eye(6))
    with pytest.raises(ValueError, match="wanda needs sums of the inputs"):
        slim(weight, Slim(method="wanda"))
    with pytest.raises(ValueError, match="not a number"):
        slim(weight * torch.nan, Slim(method="magnitude"))
    with pytest.raises(ValueError, match="what is no number"):
        slim(weight, Slim(method="sparsegpt"), torch.full((6, 6), torch.nan))
