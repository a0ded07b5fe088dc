"""Models whose layers differ, as compression leaves them: sizes, numbers by hand, texts, and what planners say."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wastenot.launch.config import DataConfig, TrainConfig
from wastenot.launch.planner_input import cut_of, shape_of
from wastenot.moe.attention import KVCache
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.config_size import count_parameters
from wastenot.moe.decoder import Decoder, build_decoder, with_router
from wastenot.moe.generate import generate
from wastenot.moe.layer import MoELayer
from wastenot.moe.upcycle import upcycled_config
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import single

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 40
UNLIKE = (3, 0, 0, 2)
"""Three experts, a dense network, attention alone, two experts."""
ROUTER = RouterConfig(top_k=2)


def shape(per_layer: tuple[int, ...], dense: tuple[int, ...] = (), shared: int = 1, **changes: Any) -> ModelConfig:
    moe = MoEConfig(experts=max(per_layer) or 8, d_expert=12, shared_experts=shared, per_layer=per_layer, dense=dense)
    usual = {"vocab_size": VOCAB, "d_model": 16, "heads": 4, "kv_heads": 2, "init_std": 0.3}
    return ModelConfig(**(usual | {"layers": len(per_layer), "moe": moe} | changes))


def built(config: ModelConfig, router: RouterConfig = ROUTER) -> Decoder:
    return build_decoder(config, router, single(), dtype=torch.float64)


def logits_of(model: Decoder, tokens_BS: Tensor) -> Tensor:
    return model.logits(model(tokens_BS).hidden_BSD)


# Sizes


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("counts", [*itertools.product((0, 2, 5), repeat=2)])
@pytest.mark.parametrize("dense", [False, True])
def test_parameters_are_those_of_the_model_that_is_built(counts: tuple[int, ...], dense: bool, shared: int) -> None:
    config = shape(counts, tuple(i for i, n in enumerate(counts) if not n) if dense else (), shared, qk_norm="head")
    with torch.device("meta"):
        model = Decoder(config, ROUTER, single())
    counted = count_parameters(config, ROUTER)
    assert counted["total"] == sum(parameter.numel() for parameter in model.parameters())
    unused = sum((n - ROUTER.top_k) * 3 * 16 * 12 for n in counts if n)
    assert counted["active"] == counted["total"] - unused


def test_a_layer_that_only_attends_has_neither_network_nor_norm() -> None:
    names = {name.removeprefix("blocks.2.") for name in built(shape(UNLIKE, (1,))).state_dict() if ".2." in name}
    attention = {f"attention.{part}.weight" for part in ("q", "k", "v", "out")}
    assert names == {"attention_norm.weight", *attention}


def test_a_pipeline_is_cut_by_what_layers_have() -> None:
    model, parallel = shape((8, 8, 8, 8, 0, 0, 0, 0), vocab_size=64), ParallelConfig(pipeline=2)
    config = TrainConfig(model=model, parallel=parallel, data=DataConfig(seq_len=8))
    assert cut_of(config) == (2, 6)
    assert cut_of(replace(config, model=shape((0, 0, 0, 0, 8, 8, 8, 8), vocab_size=64))) == (6, 2)


# Numbers


def by_hand(weights: dict[str, Tensor], config: ModelConfig, tokens_BS: Tensor) -> Tensor:
    """Logits, token by token, head by head and expert by expert."""
    return torch.stack([_sequence(weights, config, tokens_S) for tokens_S in tokens_BS])


def _norm(x_SD: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x_SD / (x_SD.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _turned(x_d: Tensor, position: int, theta: float) -> Tensor:
    half = len(x_d) // 2
    angle = position / theta ** (torch.arange(half, dtype=torch.float64) / half)
    one, other = x_d[:half], x_d[half:]
    return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()])


def _attention(weights: dict[str, Tensor], config: ModelConfig, x_SD: Tensor) -> Tensor:
    width, group = config.head_width, config.heads // config.num_kv_heads
    q, k, v = ((x_SD @ weights[f"attention.{part}.weight"].T).unflatten(1, (-1, width)) for part in "qkv")
    rows = []
    for here in range(len(x_SD)):
        heads = []
        for head in range(config.heads):
            query = _turned(q[here, head], here, config.rope_theta)
            keys = [_turned(k[there, head // group], there, config.rope_theta) for there in range(here + 1)]
            part = torch.stack([query @ key / width**0.5 for key in keys]).softmax(0)
            heads.append(part @ v[: here + 1, head // group])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ weights["attention.out.weight"].T


def _swiglu(x_D: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (F.silu(gate @ x_D) * (up @ x_D))


def _experts(weights: dict[str, Tensor], x_D: Tensor) -> Tensor:
    score_E = (weights["ffn.router.weight"] @ x_D).softmax(0)
    first, second = score_E.argsort(descending=True)[:2].tolist()
    y_D = _swiglu(x_D, *(weights[f"ffn.shared.{part}.weight"] for part in ("gate", "up", "down")))
    for expert in (first, second):
        gate, up = weights["ffn.experts.gate_up"][expert].chunk(2)
        part = score_E[expert] / (score_E[first] + score_E[second])
        y_D = y_D + part * _swiglu(x_D, gate, up, weights["ffn.experts.down"][expert])
    return y_D


def _sequence(weights: dict[str, Tensor], config: ModelConfig, tokens_S: Tensor) -> Tensor:
    x_SD = weights["embedding.weight"][tokens_S]
    for layer in range(config.layers):
        prefix = f"blocks.{layer}."
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        normed_SD = _norm(x_SD, own["attention_norm.weight"], config.norm_eps)
        x_SD = x_SD + _attention(own, config, normed_SD)
        if layer == 2:
            continue
        normed_SD = _norm(x_SD, own["ffn_norm.weight"], config.norm_eps)
        if layer == 1:
            dense = [own[f"ffn.{part}.weight"] for part in ("gate", "up", "down")]
            x_SD = x_SD + torch.stack([_swiglu(x_D, *dense) for x_D in normed_SD])
        else:
            x_SD = x_SD + torch.stack([_experts(own, x_D) for x_D in normed_SD])
    return _norm(x_SD, weights["norm.weight"], config.norm_eps) @ weights["head.weight"].T


def test_a_layer_of_each_kind_computes_what_a_calculation_by_hand_does() -> None:
    config = shape(UNLIKE, (1,))
    model, tokens_BS = built(config), torch.tensor([[5, 9, 2, 39, 0], [1, 1, 7, 3, 30]])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.linspace(0.5, 1.5, len(weight)))
        expected = by_hand(dict(model.state_dict()), config, tokens_BS)
        torch.testing.assert_close(logits_of(model, tokens_BS), expected, rtol=1e-12, atol=1e-12)
    routings = model(tokens_BS).routings
    assert [routing.num_experts for routing in routings] == [3, 2]


@pytest.mark.parametrize("rhythm", [{}, {"every": 2}, {"first_dense": 1}, {"every": 2, "first_dense": 2}])
def test_counts_of_a_layer_that_follow_a_rhythm_make_the_very_same_model(rhythm: dict[str, Any]) -> None:
    alike = ModelConfig(vocab_size=VOCAB, d_model=16, moe=MoEConfig(experts=4, d_expert=12, **rhythm))
    assert alike.moe is not None
    counts = tuple(alike.num_experts(layer) for layer in range(4))
    dense = tuple(layer for layer in range(4) if alike.is_dense(layer))
    unlike = replace(alike, moe=MoEConfig(experts=4, d_expert=12, per_layer=counts, dense=dense))
    one, other = built(alike), built(unlike)
    assert one.moe_layers == other.moe_layers
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(other.state_dict()[name].equal(weight) for name, weight in one.state_dict().items())
    tokens_BS = torch.arange(20).view(2, 10)
    assert logits_of(one, tokens_BS).equal(logits_of(other, tokens_BS))


def test_a_layer_that_only_attends_is_one_whose_network_gives_nothing() -> None:
    bare, whole = built(shape((3, 0))), built(shape((3, 0), (1,)))
    with torch.no_grad():
        whole.get_parameter("blocks.1.ffn.down.weight").zero_()
        tokens_BS = torch.arange(20).view(2, 10)
        assert logits_of(bare, tokens_BS).equal(logits_of(whole, tokens_BS))


@pytest.mark.parametrize(("counts", "dense"), [(UNLIKE, (1,)), ((0, 0, 0), (1,)), ((0, 0), ())])
def test_texts_from_the_cache_are_those_of_whole_passes(counts: tuple[int, ...], dense: tuple[int, ...]) -> None:
    model = built(shape(counts, dense))
    [text] = generate(model, [[5, 9, 2]], max_new_tokens=6, temperature=0.0)
    tokens = [5, 9, 2]
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(logits_of(model, torch.tensor([tokens]))[0, -1].argmax()))
        assert text == tokens[3:]
        cache = KVCache.empty(model.config, torch.zeros(1, dtype=torch.int64), 9, torch.float64)
        cached = model.logits(model(torch.tensor([tokens]), cache).hidden_BSD)
        torch.testing.assert_close(cached, logits_of(model, torch.tensor([tokens])), rtol=1e-12, atol=1e-12)


def test_another_router_comes_to_every_layer_that_has_one() -> None:
    model = with_router(built(shape((0, 3, 2))), RouterConfig(top_k=1))
    assert [m.router.config.top_k for m in model.modules() if isinstance(m, MoELayer)] == [1, 1]
    none = built(shape((0, 0), (0,)))
    tokens_BS = torch.arange(20).view(2, 10)
    assert logits_of(with_router(none, RouterConfig(top_k=1)), tokens_BS).equal(logits_of(none, tokens_BS))


# What others say of them


def test_planners_are_told_of_equal_layers_and_of_dense_ones_anywhere() -> None:
    found = shape_of(TrainConfig(model=shape((4, 0, 4, 0), (1, 3))))
    assert found.kinds == ("moe", "dense", "moe", "dense")
    assert found.experts is not None and found.experts.experts == 4
    dense = shape_of(TrainConfig(model=shape((0, 0), (0, 1))))
    assert (dense.experts, dense.kinds) == (None, ("dense", "dense"))


@pytest.mark.parametrize(
    ("counts", "message"),
    [((4, 0), "layer 1 has no feed-forward network"), ((4, 3), "layers have 3 to 4 experts")],
)
def test_planners_refuse_layers_of_more_kinds(counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.moe\.per_layer: {message}; dense ones and equal MoE ones alone"):
        shape_of(TrainConfig(model=shape(counts)))


def test_only_dense_models_are_upcycled() -> None:
    with pytest.raises(ValueError, match="layers are not all dense; upcycle a model with moe: null"):
        upcycled_config(shape((0, 0), (1,)), 4)
