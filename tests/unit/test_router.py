"""The router follows METHODS R1-R4, R8 and R10: small cases by hand, then properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.moe.config import RouterConfig
from wastenot.moe.losses import auxiliary_loss, load_balance, update_bias, z_loss
from wastenot.moe.router import TopKRouter, capacity_of, make_router, priority_of
from wastenot.moe.routing import Routing
from wastenot.moe.weights import combine_weights
from wastenot.parallel.mesh import single

MESH = single()
seeds = st.integers(0, 2**31)


def router(experts: int, config: RouterConfig, seed: int = 0, width: int = 6) -> TopKRouter:
    made = make_router(width, experts, config).double()
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def tokens(count: int, width: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("k", "factor", "count", "experts", "slots"),
    [(1, 1.0, 8, 4, 2), (2, 1.25, 10, 8, 4), (1, 0.1, 8, 64, 1), (8, 1.0, 7, 64, 1), (2, 1.1, 40, 8, 11)],
)
def test_capacity_rounds_up(k, factor, count, experts, slots):
    assert capacity_of(RouterConfig(top_k=k, capacity_factor=factor), count, experts) == slots


def test_gate_is_softmax_without_bias_over_all_experts():
    made = router(5, RouterConfig(top_k=2))
    x = tokens(7)
    routing = made(x)
    torch.testing.assert_close(routing.probs_TE, (x @ made.weight.t()).softmax(-1))
    assert routing.logits_TE.equal(x @ made.weight.t())


def test_gate_computes_in_fp32_under_autocast():
    made = router(5, RouterConfig(top_k=2)).float()
    with torch.autocast("cpu", torch.bfloat16):
        routing = made(tokens(7).bfloat16())
    assert routing.logits_TE.dtype == torch.float32
    assert routing.weights_TK.dtype == torch.float32


def test_tokens_that_cannot_be_cut_into_blocks_are_refused():
    with pytest.raises(ValueError, match="10 tokens cannot be cut into 4 emulated ranks; use 5"):
        router(8, RouterConfig(capacity_factor=1.0))(tokens(10), blocks=4)


def weights(probs, chosen, slots, **config) -> torch.Tensor:
    return weights_of(torch.tensor(probs, dtype=torch.float64), chosen, slots, RouterConfig(**config))


def weights_of(probs_TE: torch.Tensor, chosen: list, slots: list, config: RouterConfig) -> torch.Tensor:
    # By the sigmoid, each p is of its own logit alone.
    config = replace(config, score="sigmoid")
    return combine_weights(probs_TE.logit(), torch.tensor(chosen), torch.tensor(slots), config)


def test_weights_normalise_over_survivors():
    probs, chosen = [[0.5, 0.3, 0.2]], [[0, 1]]
    assert weights(probs, chosen, [[0, 0]]).tolist()[0] == pytest.approx([0.625, 0.375])
    assert weights(probs, chosen, [[-1, 0]]).tolist()[0] == pytest.approx([0.0, 1.0])
    assert weights(probs, chosen, [[-1, 0]], normalize="top_k").tolist()[0] == pytest.approx([0.0, 0.375])
    assert weights(probs, chosen, [[-1, 0]], normalize="none").tolist()[0] == pytest.approx([0.0, 0.3])
    assert weights(probs, chosen, [[-1, -1]]).tolist()[0] == [0.0, 0.0]
    assert weights(probs, chosen, [[0, 0]], scale=2.5).sum().item() == pytest.approx(2.5)


def test_weights_survive_underflow():
    tiny = weights([[1e-300, 1e-305, 1.0]], [[0, 1]], [[0, 0]])
    assert tiny.tolist()[0] == pytest.approx([1 / (1 + 1e-5), 1e-5 / (1 + 1e-5)])


def test_top_1_weight_is_exactly_one_and_still_teaches_the_router():
    probs = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64, requires_grad=True)
    w = weights_of(probs, [[0], [1]], [[0], [0]], RouterConfig(top_k=1))
    assert (w == 1).all()
    torch.testing.assert_close(torch.autograd.grad(w.sum(), probs)[0], torch.eye(2, dtype=torch.float64))


def test_denominator_passes_gradient_only_without_detach():
    def gradient(detach: bool) -> list[float]:
        probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64, requires_grad=True)
        w = weights_of(probs, [[0, 1]], [[0, 0]], RouterConfig(detach=detach))
        return torch.autograd.grad(w[0, 0], probs)[0][0].tolist()

    assert gradient(True) == pytest.approx([1 / 0.8, 0, 0])
    assert gradient(False) == pytest.approx([0.3 / 0.64, -0.5 / 0.64, 0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 12), st.integers(1, 4), st.floats(0.1, 3), seeds)
def test_every_choice_is_kept_or_dropped_and_weights_agree(count, experts, k, factor, seed):
    k = min(k, experts)
    routing = router(experts, RouterConfig(top_k=k, capacity_factor=factor), seed)(tokens(count, seed=seed))
    kept = routing.slots_TK >= 0
    assert routing.capacity is not None
    assert int(kept.sum()) == int(routing.counts_BE.sum()) <= count * k
    assert (routing.counts_BE <= routing.capacity).all()
    assert int(routing.load_E.sum()) == count * k
    assert ((routing.weights_TK > 0) == kept).all()
    total = routing.weights_TK.sum(1)[kept.any(1)]
    torch.testing.assert_close(total, torch.ones_like(total))
    # Nobody is dropped by an expert that has slots left.
    dropped = routing.experts_TK[~kept]
    assert (routing.counts_BE[0, dropped] == routing.capacity).all()


@pytest.mark.parametrize("priority", ["probability", "position"])
def test_dropped_tokens_rank_below_kept_ones(priority):
    config = RouterConfig(top_k=1, capacity_factor=0.5, priority=priority)
    routing = router(4, config)(tokens(64))
    rank = priority_of(routing.probs_TE) if priority == "probability" else -torch.arange(64.0)
    for expert in range(4):
        mine = routing.experts_TK[:, 0] == expert
        kept = mine & (routing.slots_TK[:, 0] >= 0)
        if (mine & ~kept).any():
            assert rank[kept].min() >= rank[mine & ~kept].max()


def test_priority_sorts_like_probability_but_ties_equal_tokens():
    best = torch.linspace(0.05, 0.99, 300, dtype=torch.float64).unsqueeze(1)
    assert priority_of(best).sort().values.equal(priority_of(best))
    assert len(priority_of(best).unique()) > 290
    p = torch.tensor([[0.125], [0.3], [0.5], [0.71]], dtype=torch.float64)
    for noise in (1e-15, -1e-15, 1e-7, -1e-7):
        assert priority_of(p * (1 + noise)).equal(priority_of(p))


def test_bias_steers_selection_but_not_weights():
    made = router(4, RouterConfig(top_k=2, bias_update=0.1))
    x = tokens(20)
    plain = made(x)
    made.bias_E[3] = 10.0
    steered = made(x)
    assert (steered.experts_TK == 3).any(1).all()
    assert steered.probs_TE.equal(plain.probs_TE)
    p = steered.probs_TE.gather(1, steered.experts_TK)
    torch.testing.assert_close(steered.weights_TK, p / p.sum(1, keepdim=True))


def test_bias_moves_toward_underused_experts():
    made = router(3, RouterConfig(top_k=1, bias_update=0.01))
    update_bias(made, torch.tensor([10, 0, 5]))
    assert made.bias_E.tolist() == pytest.approx([-0.01, 0.01, 0.0])


def test_jitter_acts_in_training_only():
    made = router(8, RouterConfig(top_k=2, jitter=0.3))
    x = tokens(30)
    assert not made(x).logits_TE.equal(made(x).logits_TE)
    made.eval()
    assert made(x).logits_TE.equal(made(x).logits_TE)


def test_sigmoid_scores_are_independent_and_probabilities_sum_to_one():
    routing = router(6, RouterConfig(top_k=3, score="sigmoid"))(tokens(9))
    scores = routing.logits_TE.sigmoid()
    torch.testing.assert_close(routing.probs_TE, scores / scores.sum(-1, keepdim=True))
    picked = scores.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, picked / picked.sum(1, keepdim=True))


@pytest.mark.parametrize("config", [RouterConfig(capacity_factor=0.7), RouterConfig(top_k=1), RouterConfig()])
def test_emulated_blocks_equal_separate_ranks_bit_for_bit(config):
    made = router(8, config)
    x = tokens(48)
    together = made(x, blocks=4)
    for i, block in enumerate(x.chunk(4)):
        alone = made(block)
        part = slice(i * 12, (i + 1) * 12)
        assert together.logits_TE[part].equal(alone.logits_TE)
        assert together.experts_TK[part].equal(alone.experts_TK)
        assert together.slots_TK[part].equal(alone.slots_TK)
        assert together.weights_TK[part].equal(alone.weights_TK)
        assert together.counts_BE[i].equal(alone.counts_BE[0])


def routing_of(first: list[int], probs: list[list[float]], blocks: int = 1) -> Routing:
    probs_TE = torch.tensor(probs, dtype=torch.float64)
    chosen = torch.tensor(first).unsqueeze(1)
    counts = torch.zeros(blocks, probs_TE.size(1), dtype=torch.int64)
    return Routing(
        experts_TK=chosen,
        weights_TK=torch.ones(len(first), 1),
        slots_TK=torch.zeros_like(chosen),
        counts_BE=counts,
        capacity=None,
        logits_TE=probs_TE.log(),
        probs_TE=probs_TE,
        top_k=1,
    )


def test_balance_loss_by_hand():
    # f = (3/4, 1/4), P = (0.6, 0.4): 2 * (0.45 + 0.1)
    routing = routing_of([0, 0, 0, 1], [[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.3, 0.7]])
    assert load_balance(routing, "block", MESH, 2).item() == pytest.approx(1.1)
    assert load_balance(routing, "global", MESH, 2).item() == pytest.approx(1.1)
    # Sequences (0, 1) and (2, 3): 2 * (1 * 0.75) and 2 * (0.5 * 0.45 + 0.5 * 0.55), averaged.
    assert load_balance(routing, "sequence", MESH, 2).item() == pytest.approx((1.5 + 1.0) / 2)
    two_blocks = replace(routing, counts_BE=torch.zeros(2, 2, dtype=torch.int64))
    assert load_balance(two_blocks, "block", MESH, 1).item() == pytest.approx((1.5 + 1.0) / 2)


def test_balance_loss_of_even_routing_is_one():
    routing = routing_of([0, 1, 2, 3], [[0.25] * 4] * 4)
    assert load_balance(routing, "block", MESH, 1).item() == pytest.approx(1.0)


def test_z_loss_by_hand():
    routing = routing_of([0, 0], [[0.5, 0.5], [0.5, 0.5]])
    shifted = replace(routing, logits_TE=torch.zeros(2, 2, dtype=torch.float64))
    assert z_loss(shifted, MESH).item() == pytest.approx(torch.tensor(2.0).log().item() ** 2)


def test_auxiliary_losses_ignore_drops_and_count_each_layer_once():
    x = tokens(40)
    config = RouterConfig(top_k=2, balance_loss=0.1, z_loss=0.01)
    dropless = router(4, config)(x)
    dropping = router(4, replace(config, capacity_factor=0.3))(x)
    one, shown = auxiliary_loss([dropless], config, MESH, 1)
    same, _ = auxiliary_loss([dropping], config, MESH, 1)
    two, _ = auxiliary_loss([dropless, dropping], config, MESH, 1)
    assert one.item() == same.item()
    assert two.item() == pytest.approx(2 * one.item())
    assert one.item() == pytest.approx(0.1 * shown["balance_loss"].item() + 0.01 * shown["z_loss"].item())
