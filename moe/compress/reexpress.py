"""Mixtral and DeepSeek-MoE as Qwen2-MoE: the same function under names whose config can say which layers are dense.

Qwen2-MoE always has one shared expert behind a gate of its own. Mixtral's is zero. DeepSeek's shared experts are one
of their total width: a gate of zeros halves it (sigmoid of 0), so its down projection is doubled, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .export_config import STOCK
from .export_source import Lazy, Source, zeros

__all__ = ["REEXPRESSED", "as_qwen2_moe"]

REEXPRESSED = ("mixtral", "deepseek")
"""Families that can be written as qwen2_moe."""

_FAMILY = "qwen2_moe"

_KEPT = (
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "max_position_embeddings",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "output_router_logits",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "router_aux_loss_coef",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
)
"""Keys that mean the same in both."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
    },
    "deepseek": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "bos_token_id": 100000, "eos_token_id": 100001},
}
"""What a file means that does not say so; Qwen2-MoE's own defaults differ."""

_THETA = {"mixtral": 1e6, "deepseek": 1e4}


def as_qwen2_moe(source: Source, width: int, *, biases: bool) -> Source:
    """`source`, of one of the families REEXPRESSED, as a qwen2_moe checkpoint of the same function.

    width: hidden units of a shared expert of zeros, where there is none; biases: write biases of zero for queries,
    keys and values, for loaders that always have them.
    Raises ValueError where its config.json says what Qwen2-MoE cannot.
    """
    if source.family == "deepseek":
        _check_deepseek(source)
    config = _config(source, width, biases)
    return replace(source, family=_FAMILY, config=config, weights=dict(_weights(source, width, biases)))


def _config(source: Source, width: int, biases: bool) -> dict[str, Any]:
    given = _DEFAULTS[source.family] | source.config
    given.setdefault("num_key_value_heads", given["num_attention_heads"])
    new: dict[str, Any] = {key: given[key] for key in _KEPT if key in given}
    if not isinstance(given.get("rope_parameters"), Mapping):
        new["rope_theta"] = given.get("rope_theta", _THETA[source.family])
    if given.get("head_dim") not in (None, given["hidden_size"] // given["num_attention_heads"]):
        new["head_dim"] = given["head_dim"]
    new |= {"model_type": _FAMILY, "qkv_bias": biases}
    if given.get("sliding_window") is not None:
        layers = given["num_hidden_layers"]
        new |= {"use_sliding_window": True, "sliding_window": given["sliding_window"], "max_window_layers": 0}
        new["layer_types"] = ["sliding_attention"] * layers
    else:
        new["use_sliding_window"] = False
    if source.family == "mixtral":
        experts, shared, dense = given["intermediate_size"], width, width
        new["norm_topk_prob"] = True
    else:
        experts = given["moe_intermediate_size"]
        shared, dense = experts * (given.get("n_shared_experts") or 0) or width, given["intermediate_size"]
        new["norm_topk_prob"] = bool(given.get("norm_topk_prob"))
        if "aux_loss_alpha" in given:
            new["router_aux_loss_coef"] = given["aux_loss_alpha"]
    return new | {
        "moe_intermediate_size": experts,
        "shared_expert_intermediate_size": shared,
        "intermediate_size": dense,
    }


def _weights(source: Source, width: int, biases: bool) -> Iterator[tuple[str, Lazy]]:
    stock = STOCK[source.family]
    dtype = source.weights["model.norm.weight"].read().dtype
    D = source.weights["model.norm.weight"].shape[0]
    has_shared = any(".shared_experts." in name for name in source.weights)
    for name, lazy in source.weights.items():
        new = name.replace(f".{stock.block}.", ".mlp.").replace(".shared_experts.", ".shared_expert.")
        if ".experts." in name:
            for theirs, ours in zip(stock.projections, ("gate_proj", "up_proj", "down_proj"), strict=True):
                new = new.replace(f".{theirs}.", f".{ours}.")
        doubled = name.endswith(".shared_experts.down_proj.weight")
        yield new, _doubled(lazy) if doubled else lazy
        if biases and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            yield new.removesuffix("weight") + "bias", zeros(lazy.shape[:1], dtype)
    for layer, experts in enumerate(source.shape.experts):
        if not experts:
            continue
        prefix = f"model.layers.{layer}.mlp.shared_expert"
        yield f"{prefix}_gate.weight", zeros((1, D), dtype)
        if not has_shared:
            yield f"{prefix}.gate_proj.weight", zeros((width, D), dtype)
            yield f"{prefix}.up_proj.weight", zeros((width, D), dtype)
            yield f"{prefix}.down_proj.weight", zeros((D, width), dtype)


def _doubled(lazy: Lazy) -> Lazy:
    return Lazy(lazy.shape, lambda: 2 * lazy.read())


def _check_deepseek(source: Source) -> None:
    """Raises ValueError where the router of a DeepSeek-MoE is not Qwen2-MoE's."""
    for name, legal in (
        ("moe_layer_freq", 1),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("routed_scaling_factor", 1),
        ("attention_bias", False),
    ):
        if source.config.get(name) not in (None, legal):
            raise ValueError(f"{name}: {source.config[name]!r} cannot be said by a Qwen2-MoE; only {legal!r} can")
