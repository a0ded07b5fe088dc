"""Mixtral and DeepSeek-MoE as Qwen2-MoE: the same function under names whose config can say which layers are dense.

Qwen2-MoE always has one shared expert behind a gate of its own; Mixtral's becomes one of zeros. DeepSeek's shared
experts are one of their total width: a gate of zeros halves it (sigmoid of 0), so its down projection is doubled,
which is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .export_source import Lazy, Source, zeros
from .places import name_of, place_of

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

_MIXTRAL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
"""What Mixtral's files mean that do not say so: Qwen2-MoE's own defaults differ."""


def as_qwen2_moe(source: Source, width: int, *, biases: bool) -> Source:
    """`source`, of one of the families REEXPRESSED, as a qwen2_moe checkpoint of the same function.

    width: hidden units of a shared expert of zeros, where there is none; biases: write biases of zero for queries,
    keys and values, for loaders that always have them.
    Raises ValueError where attention has a window, which loaders of Qwen2-MoE do not agree on.
    """
    config = _config(source, width, biases)
    return replace(source, family=_FAMILY, config=config, weights=dict(_weights(source, width, biases)))


def _config(source: Source, width: int, biases: bool) -> dict[str, Any]:
    given = source.config if source.family == "deepseek" else {**_MIXTRAL, **source.config}
    new: dict[str, Any] = {key: given[key] for key in _KEPT if key in given}
    new |= {"model_type": _FAMILY, "qkv_bias": biases, "use_sliding_window": False}
    if given.get("head_dim") not in (None, given["hidden_size"] // given["num_attention_heads"]):
        new["head_dim"] = given["head_dim"]
    window = given.get("sliding_window")
    if window is not None and window < given["max_position_embeddings"]:
        raise ValueError(
            f"{source.where}: sliding_window: {window}; layers without experts need a {_FAMILY} model, which has no "
            f"window in vLLM and another one in transformers 4 with a cache. Drop whole blocks instead"
        )
    if isinstance(given.get("rope_parameters"), Mapping):
        new["rope_theta"] = given["rope_parameters"].get("rope_theta", given["rope_theta"])
    experts, shared, dense = given["intermediate_size"], width, width
    new["num_experts"] = given["n_routed_experts" if source.family == "deepseek" else "num_local_experts"]
    if source.family == "deepseek":
        experts, dense = given["moe_intermediate_size"], given["intermediate_size"]
        shared = experts * (given["n_shared_experts"] or 0) or width
        new["router_aux_loss_coef"] = given["aux_loss_alpha"]
    return new | {
        "norm_topk_prob": given.get("norm_topk_prob", True),
        "moe_intermediate_size": experts,
        "shared_expert_intermediate_size": shared,
        "intermediate_size": dense,
    }


def _weights(source: Source, width: int, biases: bool) -> Iterator[tuple[str, Lazy]]:
    D, dtype = source.weights["model.norm.weight"].shape[0], source.dtype
    layers = source.shape.layers
    for name, lazy in source.weights.items():
        if source.family == "deepseek":
            new = name.replace(".shared_experts.", ".shared_expert.")
        else:
            new = name_of(place_of(name, source.family, layers), _FAMILY)
        yield new, _doubled(lazy) if new.endswith(".shared_expert.down_proj.weight") else lazy
        if biases and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            yield new.removesuffix("weight") + "bias", zeros(lazy.shape[:1], dtype)
    for layer in source.shape.moe_layers:
        prefix = f"model.layers.{layer}.mlp.shared_expert"
        yield f"{prefix}_gate.weight", zeros((1, D), dtype)
        if not source.config.get("n_shared_experts"):
            yield f"{prefix}.gate_proj.weight", zeros((width, D), dtype)
            yield f"{prefix}.up_proj.weight", zeros((width, D), dtype)
            yield f"{prefix}.down_proj.weight", zeros((D, width), dtype)


def _doubled(lazy: Lazy) -> Lazy:
    return Lazy(lazy.shape, lambda: 2 * lazy.read())
