"""The packaged shapes, built on `meta`, are the published models: sizes, configurations, every name and shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from wastenot.launch.settings import load_config
from wastenot.moe.adapters.huggingface import config_from_huggingface, config_to_huggingface, disk_shapes
from wastenot.moe.config import RouterConfig
from wastenot.moe.config_size import count_parameters
from wastenot.moe.decoder import Decoder
from wastenot.parallel.mesh import single

# What counts of the published config.json.
PUBLISHED: dict[str, dict[str, Any]] = {
    "models/mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "models/qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "models/olmoe-1b-7b": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "clip_qkv": None,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
    },
    "models/deepseek-moe-16b": {
        "model_type": "deepseek",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "hidden_act": "silu",
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
    },
}

# Half the total_size that the index of the published bf16 checkpoint states.
TOTAL = {
    "models/mixtral-8x7b": 46_702_792_704,
    "models/qwen3-30b-a3b": 30_532_122_624,
    "models/olmoe-1b-7b": 6_919_161_856,
    "models/deepseek-moe-16b": 16_375_728_128,
}


@functools.cache
def on_meta(name: str) -> Decoder:
    config = load_config(name)
    with torch.device("meta"):
        return Decoder(config.model, config.router, single("meta"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_number_exactly_those_published(name: str) -> None:
    model = on_meta(name)
    total = sum(parameter.numel() for parameter in model.parameters())
    config = load_config(name)
    assert total == TOTAL[name] == count_parameters(config.model, config.router)["total"]


def what_it_computes(router: RouterConfig) -> tuple:
    """Without a denominator there is nothing to stop the gradient at: `detach` says nothing then."""
    detach = router.detach and router.normalize != "none"
    return router.top_k, router.score, router.normalize, detach, router.scale, router.groups, router.balance_loss


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_packaged_ones(name: str) -> None:
    model, router, family = config_from_huggingface(PUBLISHED[name])
    ours = load_config(name)
    written_out = replace(ours.model, kv_heads=ours.model.num_kv_heads, d_head=ours.model.head_width)
    # How the authors initialised is in their papers, not in these files.
    assert replace(model, init_std=0.02) == replace(written_out, init_std=0.02)
    assert what_it_computes(router) == what_it_computes(ours.router)
    back = config_to_huggingface(ours.model, ours.router, family)
    assert {key: back[key] for key in PUBLISHED[name] if key in back} == {
        key: value for key, value in PUBLISHED[name].items() if key in back
    }


def on_disk(name: str, shape: torch.Size, family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes on disk of a parameter of transformers 5."""
    name = name.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else name
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    if ".experts." not in name:
        yield name, tuple(shape)
        return
    stem = name.rpartition(".")[0]
    for expert in range(shape[0]):
        if name.endswith("gate_up_proj"):
            for part in (gate, up):
                yield f"{stem}.{expert}.{part}.weight", (shape[1] // 2, shape[2])
        else:
            yield f"{stem}.{expert}.{down}.weight", tuple(shape[1:])


# transformers has no model of DeepSeek-MoE-16B: its code comes with the checkpoint.
@pytest.mark.parametrize("name", [name for name in PUBLISHED if "deepseek" not in name])
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    family = PUBLISHED[name]["model_type"]
    given = {key: value for key, value in PUBLISHED[name].items() if key != "model_type"}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given))
    expected = dict(
        item for name, parameter in theirs.named_parameters() for item in on_disk(name, parameter.shape, family)
    )
    assert disk_shapes(on_meta(name), family) == expected


def test_deepseek_names_are_those_of_its_checkpoint() -> None:
    """As its index lists them: a dense first layer, then 64 experts beside one stack of the two shared ones."""
    shapes = disk_shapes(on_meta("models/deepseek-moe-16b"), "deepseek")
    attention = {f"self_attn.{part}_proj": (2048, 2048) for part in "qkvo"}
    norms = {"input_layernorm": (2048,), "post_attention_layernorm": (2048,)}
    dense = {"mlp.gate_proj": (10944, 2048), "mlp.up_proj": (10944, 2048), "mlp.down_proj": (2048, 10944)}
    moe: dict[str, tuple[int, ...]] = {"mlp.gate": (64, 2048)}
    for stem, width in [*((f"mlp.experts.{e}", 1408) for e in range(64)), ("mlp.shared_experts", 2816)]:
        moe |= {
            f"{stem}.gate_proj": (width, 2048),
            f"{stem}.up_proj": (width, 2048),
            f"{stem}.down_proj": (2048, width),
        }
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (102400, 2048),
        "model.norm.weight": (2048,),
        "lm_head.weight": (102400, 2048),
    }
    for layer in range(28):
        parts = attention | norms | (moe if layer else dense)
        expected |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    assert shapes == expected
