"""The packaged shapes have the sizes their authors published."""

from __future__ import annotations

import pytest

from wastenot.launch.settings import load_config, packaged
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.config_size import count_parameters

# Published totals in billions of parameters: all, used per token.
PUBLISHED = {
    "models/mixtral-8x7b": (46.7, 12.9),
    "models/qwen3-30b-a3b": (30.5, 3.3),
    "models/olmoe-1b-7b": (6.9, 1.3),
    "models/deepseek-moe-16b": (16.4, 2.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    config = load_config(name)
    size = count_parameters(config.model, config.router)
    total, active = PUBLISHED[name]
    # Authors print one decimal, and some round down.
    assert size["total"] / 1e9 == pytest.approx(total, abs=0.051)
    assert size["active"] / 1e9 == pytest.approx(active, abs=0.1)


def test_every_packaged_shape_has_a_published_size() -> None:
    assert {name for name in packaged() if name.startswith("models/")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_gate_gradients_flow_as_in_the_original(name: str) -> None:
    """Originals that renormalise the top-k weights let the gradient through the denominator."""
    router = load_config(name).router
    assert router.normalize in ("none", "top_k")
    assert router.normalize == "none" or not router.detach


def test_a_small_model_counted_by_hand() -> None:
    """D 8, 2 layers (dense, then MoE), 2 heads of 4 over 1 key/value head, 3 experts of 16 and a shared one."""
    model = ModelConfig(
        vocab_size=10,
        d_model=8,
        layers=2,
        heads=2,
        kv_heads=1,
        d_ff=32,
        qk_norm="head",
        moe=MoEConfig(experts=3, d_expert=16, shared_experts=1, every=2),
    )
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 4 + 4
    norms = 2 * 8
    dense = 3 * 8 * 32
    expert = 3 * 8 * 16
    outside = 2 * 10 * 8 + 8
    always = outside + 2 * (attention + norms) + dense + 8 * 3 + expert
    assert count_parameters(model, RouterConfig(top_k=2)) == {
        "total": always + 3 * expert,
        "active": always + 2 * expert,
    }


def test_a_dense_tied_model_uses_all_it_has() -> None:
    model = ModelConfig(d_model=8, layers=1, heads=1, d_ff=16, tie_embeddings=True, qk_norm="full", moe=None)
    everything = 10 * 8 + 8 + (4 * 8 * 8 + 16) + 16 + 3 * 8 * 16
    assert count_parameters(model, RouterConfig(), vocab_size=10) == {"total": everything, "active": everything}


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ValueError, match="vocab_size: 0"):
        count_parameters(ModelConfig(), RouterConfig())
