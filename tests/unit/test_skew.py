"""Routers for benchmarks make the loads that their names promise, and repeat recorded ones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.moe.load import load_of
from wastenot.moe.router import make_router
from wastenot.moe.routing import Routing
from wastenot.moe.skew import save_trace
from wastenot.moe.trace import read_trace, write_trace
from wastenot.parallel.mesh import single

pytestmark = pytest.mark.usefixtures("one_thread")


def routed(tokens: int, experts: int, blocks: int = 1, layer: int = 0, **config) -> Routing:
    """What a forced router makes of zeros."""
    router = make_router(4, experts, RouterConfig(**config), layer=layer)
    torch.nn.init.zeros_(router.weight)
    return router(torch.zeros(tokens, 4), blocks)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_uniform_uses_all_experts_evenly_and_drops_nothing(experts, top_k, rounds):
    top_k = min(top_k, experts)
    tokens = rounds * experts
    routing = routed(tokens, experts, kind="uniform", top_k=top_k, capacity_factor=1.0)
    assert (routing.load_E == tokens * top_k // experts).all()
    assert (routing.slots_TK >= 0).all()


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 2.0])
def test_skewed_first_choices_follow_zipfs_law(skew):
    experts, tokens = 6, 20_000
    first = routed(tokens, experts, kind="skewed", skew=skew, top_k=2).experts_TK[:, 0]
    share_E = first.bincount(minlength=experts) / tokens
    wanted_E = torch.arange(1, experts + 1).double().pow(-skew)
    wanted_E /= wanted_E.sum()
    # Five standard deviations of a share.
    assert (share_E - wanted_E).abs().max() < 5 * math.sqrt(0.25 / tokens)


def share_of_busiest(first_T: Tensor, experts: int) -> float:
    return first_T.bincount(minlength=experts).max().item() / first_T.numel()


def test_bursts_are_uneven_at_a_time_and_even_in_the_long_run():
    experts, tokens = 8, 64_000
    first = routed(tokens, experts, kind="bursty", skew=2.0, top_k=1).experts_TK[:, 0]
    bursts = [share_of_busiest(burst, experts) for burst in first.split(32)]
    assert min(bursts) > 0.75, "a burst has a favourite"
    assert share_of_busiest(first, experts) < 1.2 / experts
    assert load_of(first.bincount(minlength=experts).unsqueeze(0)).cv < 0.1


@pytest.mark.parametrize("kind", ["uniform", "skewed", "bursty"])
def test_forced_logits_are_the_same_at_every_step_and_for_every_rank(kind):
    config = {"kind": kind, "top_k": 2}
    one = routed(20, 8, **config).logits_TE
    assert routed(20, 8, **config).logits_TE.equal(one)
    assert routed(60, 8, blocks=3, **config).logits_TE.equal(torch.cat([one] * 3)), "emulated ranks are ranks"
    if kind != "uniform":
        assert not routed(20, 8, layer=1, **config).logits_TE.equal(one), "layers differ"


def test_forced_routers_teach_nothing():
    router = make_router(4, 8, RouterConfig(kind="skewed", top_k=2)).double()
    torch.nn.init.ones_(router.weight)
    x_TD = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights_TK = router(x_TD).weights_TK
    found = torch.autograd.grad((weights_TK * torch.arange(2)).sum(), [x_TD, router.weight])
    assert not any(gradient.any() for gradient in found)


def test_a_trace_repeats_what_was_recorded(tmp_path: Path):
    """In a model that is built on `meta`, layer by layer, from the beginning where tokens outnumber it."""
    config = ModelConfig(vocab_size=16, d_model=16, layers=3, heads=2, moe=MoEConfig(experts=4, d_expert=16))
    tokens = torch.arange(12).view(2, 6)
    recorded = build_decoder(config, RouterConfig(), single())(tokens).routings
    save_trace(tmp_path / "trace", recorded)
    replay = RouterConfig(kind="replay", trace=str(tmp_path / "trace"), balance_loss=0.0)
    replayed = build_decoder(config, replay, single(), seed=1)(torch.zeros_like(tokens)).routings
    assert len(replayed) == len(recorded) == 3
    for there, here in zip(recorded, replayed, strict=True):
        assert here.logits_TE.equal(there.logits_TE)
        assert here.experts_TK.equal(there.experts_TK)
        assert here.weights_TK.equal(there.weights_TK)
    longer = build_decoder(config, replay, single())(torch.zeros(5, 6, dtype=torch.int64)).routings[1]
    assert longer.logits_TE.equal(recorded[1].logits_TE.repeat(3, 1)[:30])


def write_other_experts(path: Path) -> None:
    write_trace(path, [np.zeros((3, 6))])


def write_other_layers(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"layer1": np.zeros((3, 4), np.float32)}, path)


def write_no_matrix(path: Path) -> None:
    write_trace(path, [np.zeros(4)])


def write_nothing(path: Path) -> None:
    write_trace(path, [])


def write_text(path: Path) -> None:
    path.write_text("no trace at all")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_other_experts, "is of 6 experts, the model has 4; use 6"),
        (write_other_layers, "holds no router logits; `wastenot eval RUN --trace FILE` records one"),
        (write_no_matrix, "holds no router logits"),
        (write_nothing, "holds no router logits"),
        (write_text, "cannot be read"),
        (Path.mkdir, "cannot be read"),
        (lambda path: None, "cannot be read (No such file"),
    ],
)
def test_what_is_no_trace_of_this_model_is_explained(write, message, tmp_path: Path):
    write(tmp_path / "trace")
    with pytest.raises(ValueError, match="trace: ") as error:
        read_trace(tmp_path / "trace", {0: 4})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="trace: "):
        make_router(4, 4, RouterConfig(kind="replay", trace=str(tmp_path / "trace")))
