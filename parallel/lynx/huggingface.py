"""Hugging Face's config.json (as plain values, of transformers 4 or 5) as a ModelShape.

Keys that change neither work nor memory are left alone; what does and is not modelled is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .nearest import suggestion
from .shape import Experts, Latent, ModelShape


def from_huggingface(config: Mapping[str, Any], name: str = "") -> ModelShape:
    """The shape that `config` describes; `name` stands in where it has none.

    Raises ValueError in one line: an architecture that is not known here, a key that is missing or no whole number, or
    attention over a sliding window.
    """
    kind = config.get("model_type")
    if kind not in _READERS:
        raise ValueError(f"model_type: {kind!r} is no architecture known here; {suggestion(str(kind), _READERS)}")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise ValueError(f"sliding_window: {config['sliding_window']} is not modelled; use null: attention over all")
    if kind == "mistral" and "sliding_window" not in config:
        raise ValueError("sliding_window: missing, which means 4096 in this family and is not modelled; use null")
    called = name or str(config.get("_name_or_path") or config.get("name") or kind)
    return ModelShape(name=called, **_READERS[kind](_Keys(config)))


class _Keys:
    """Reads whole numbers out of a config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def whole(self, *names: str, default: int | None = None) -> int:
        """The first of `names` that is there and not null. Raises ValueError where none is, without a default."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: {value!r} is not a whole number")
            return value
        if default is None:
            raise ValueError(f"{names[0]}: missing, and {self.config['model_type']} needs it")
        return default

    def flag(self, name: str) -> bool:
        return bool(self.config.get(name))


def _llama(keys: _Keys) -> dict[str, Any]:
    """Grouped-query attention with rotary embeddings, SwiGLU; what most families share."""
    d_model, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    return {
        "vocab": keys.whole("vocab_size"),
        "d_model": d_model,
        "layers": keys.whole("num_hidden_layers"),
        "heads": heads,
        "kv_heads": keys.whole("num_key_value_heads", default=heads),
        "head_dim": keys.whole("head_dim", default=d_model // heads),
        "d_ff": keys.whole("intermediate_size"),
        "tied": keys.flag("tie_word_embeddings"),
    }


def _qwen3(keys: _Keys) -> dict[str, Any]:
    return _llama(keys) | {"qk_norm": "head", "head_dim": keys.whole("head_dim", default=128)}


def _mixtral(keys: _Keys) -> dict[str, Any]:
    experts = Experts(
        experts=keys.whole("num_local_experts", "num_experts"),
        top_k=keys.whole("num_experts_per_tok"),
        d_expert=keys.whole("intermediate_size"),
    )
    return _llama(keys) | {"experts": experts}


def _olmoe(keys: _Keys) -> dict[str, Any]:
    return _mixtral(keys) | {"qk_norm": "full"}


def _qwen3_moe(keys: _Keys) -> dict[str, Any]:
    experts = Experts(
        experts=keys.whole("num_experts", "num_local_experts"),
        top_k=keys.whole("num_experts_per_tok"),
        d_expert=keys.whole("moe_intermediate_size"),
    )
    every, listed = keys.whole("decoder_sparse_step", default=1), keys.config.get("mlp_only_layers") or ()
    layers = range(keys.whole("num_hidden_layers"))
    dense = tuple(layer for layer in layers if layer in listed or (layer + 1) % every)
    return _qwen3(keys) | {"experts": experts, "dense_layers": dense}


def _deepseek(keys: _Keys) -> dict[str, Any]:
    width = keys.whole("moe_intermediate_size")
    experts = Experts(
        experts=keys.whole("n_routed_experts"),
        top_k=keys.whole("num_experts_per_tok"),
        d_expert=width,
        shared_width=keys.whole("n_shared_experts", default=0) * width,
        groups=keys.whole("n_group", default=1),
        top_groups=keys.whole("topk_group", default=1),
    )
    first, every = keys.whole("first_k_dense_replace", default=0), keys.whole("moe_layer_freq", default=1)
    layers = range(keys.whole("num_hidden_layers"))
    dense = tuple(layer for layer in layers if layer < first or layer % every)
    return _llama(keys) | {"experts": experts, "dense_layers": dense}


def _deepseek_latent(keys: _Keys) -> dict[str, Any]:
    """Without the multi-token prediction modules."""
    latent = Latent(
        query_rank=keys.whole("q_lora_rank", default=0),
        kv_rank=keys.whole("kv_lora_rank"),
        nope_dim=keys.whole("qk_nope_head_dim"),
        rope_dim=keys.whole("qk_rope_head_dim"),
        value_dim=keys.whole("v_head_dim"),
    )
    heads = keys.whole("num_attention_heads")
    return _deepseek(keys) | {"latent": latent, "kv_heads": heads, "head_dim": latent.value_dim}


def _gpt2(keys: _Keys) -> dict[str, Any]:
    d_model, heads = keys.whole("n_embd"), keys.whole("n_head")
    drops = any(keys.config.get(name, 0.1) for name in ("resid_pdrop", "attn_pdrop"))
    return {
        "vocab": keys.whole("vocab_size"),
        "d_model": d_model,
        "layers": keys.whole("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": d_model // heads,
        "d_ff": keys.whole("n_inner", default=4 * d_model),
        # Tied unless the file says otherwise: this family's own default.
        "tied": bool(keys.config.get("tie_word_embeddings", True)),
        "gated": False,
        "rotary": False,
        "positions": keys.whole("n_positions"),
        "biases": True,
        "dropout": drops,
    }


_READERS: Mapping[Any, Callable[[_Keys], dict[str, Any]]] = {
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek_latent,
    "deepseek_v3": _deepseek_latent,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
