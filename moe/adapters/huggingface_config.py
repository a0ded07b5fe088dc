"""Hugging Face's config.json as our ModelConfig and RouterConfig, and back. Torch-free.

Every key that changes what the model computes is either carried over or, where only one of the two sides can say
it, refused: all that is wrong is listed in one ValueError. Keys about training (dropout apart) mean less: the
coefficient of the load-balancing loss is carried over, its form is ours (METHODS R8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..config import ModelConfig, MoEConfig, RouterConfig
from .huggingface_names import FAMILIES, Family, has_experts
from .options import read_number

ARCHITECTURES: dict[Family, str] = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
}
_SAME_AS: dict[str, Family] = {"mistral": "llama"}
"""Values of `model_type` that name the models of another family, under the same names on disk."""

_QK_NORM: dict[Family, str] = {
    "mixtral": "none",
    "qwen3_moe": "head",
    "olmoe": "full",
    "deepseek": "none",
    "llama": "none",
}
_ROPE_THETA = {"mixtral": 1e6}
"""What a file that names no theta means; 1e4 in the other families."""


class _Reader:
    """Reads keys of one config.json and notes all that is wrong with them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []

    def number(self, *names: str, default: float | None = None) -> float:
        """The first of `names` that is there; a problem where none is and there is no default."""
        return read_number(self.config, self.problems, names, default)

    def integer(self, *names: str, default: int | None = None) -> int:
        """As `number`, of a whole one."""
        value = self.number(*names, default=default)
        if value != int(value):
            self.problems.append(f"{names[0]}: {value} is not a whole number")
        return int(value)

    def only(self, name: str, *legal: object, why: str) -> None:
        """Notes a problem where `name` is there and none of `legal`."""
        value = self.config.get(name)
        if value is not None and value not in legal:
            allowed = " or ".join(map(repr, legal)) or "null"
            self.problems.append(f"{name}: {value!r} {why}; only {allowed} can be carried over")


def config_from_huggingface(config: Mapping[str, Any]) -> tuple[ModelConfig, RouterConfig, Family]:
    """Our configuration of the model that `config` (a parsed config.json, of transformers 4 or 5) describes.

    Raises ValueError listing every key that is missing, or says what our model cannot compute.
    """
    kind = config.get("model_type")
    family = _SAME_AS.get(kind, kind) if isinstance(kind, str) else kind
    if family not in FAMILIES:
        known = ", ".join([*FAMILIES, *_SAME_AS])
        raise ValueError(f"model_type: {kind!r} is no family known here; use one of {known}")
    reader = _Reader(config)
    _refuse_what_differs(reader, family)
    d_model, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    layers = reader.integer("num_hidden_layers")
    experts, choice = _experts(reader, family, layers) if has_experts(family) else ({}, {})
    vocab_size, kv_heads = reader.integer("vocab_size"), reader.integer("num_key_value_heads", default=heads)
    d_head = reader.integer("head_dim", default=d_model // max(1, heads))
    d_ff = reader.integer("intermediate_size") if family in _DENSE_WIDTH else 0
    rope_theta, norm_eps = _rope_theta(reader, family), float(reader.number("rms_norm_eps"))
    init_std = float(reader.number("initializer_range", default=0.02))
    if reader.problems:
        raise ValueError("\n".join([f"config.json ({family}) cannot be carried over:", *reader.problems]))
    model = ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        d_head=d_head,
        d_ff=d_ff,
        rope_theta=rope_theta,
        norm_eps=norm_eps,
        qk_norm=_QK_NORM[family],  # pyright: ignore[reportArgumentType]
        tie_embeddings=bool(config.get("tie_word_embeddings")),
        init_std=init_std,
        init_residual="plain",
        moe=MoEConfig(**experts) if has_experts(family) else None,
    )
    return model, RouterConfig(**choice), family


def config_to_huggingface(
    model: ModelConfig,
    router: RouterConfig,
    family: Family,
    *,
    max_positions: int = 4096,
    end_token: int | None = None,
) -> dict[str, Any]:
    """The config.json, as plain values, with which stock models of `family` compute what ours do.

    Stock models are dropless: a capacity is left behind, as generation here leaves it. `max_positions` is what the
    file is to claim as the longest context; `end_token` ends generated texts.

    Raises ValueError listing all that the family cannot say.
    """
    problems = [*_not_said_by_any(model, router), *_not_said_by(family, model, router)]
    if problems:
        raise ValueError("\n".join([f"the {family} family has no such models:", *problems]))
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        # transformers 4 reads the first, transformers 5 the second.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        # Said even where unknown: the families' own defaults are other tokenizers' tokens.
        "bos_token_id": None,
        "eos_token_id": end_token,
        "pad_token_id": None,
    }
    if family in _HEAD_WIDTH:
        config["head_dim"] = model.head_width
    if family in _DENSE_WIDTH:
        config["intermediate_size"] = model.dense_width
    return config | _of_experts(model.moe, router, family) if model.moe and model.expert_counts else config


def _of_experts(moe: MoEConfig, router: RouterConfig, family: Family) -> dict[str, Any]:
    """The keys of config.json that are about experts."""
    dense = list(moe.dense) if moe.per_layer else list(range(moe.first_dense))
    config: dict[str, Any] = {
        "num_experts_per_tok": router.top_k,
        _EXPERTS[family][0]: moe.experts,
        _EXPERT_WIDTH[family]: moe.d_expert,
        "aux_loss_alpha" if family == "deepseek" else "router_aux_loss_coef": router.balance_loss,
    }
    if family != "mixtral":
        config["norm_topk_prob"] = router.normalize != "none"
    if family == "qwen3_moe":
        config |= {"decoder_sparse_step": moe.every, "mlp_only_layers": dense}
    if family == "deepseek":
        config |= {
            "n_shared_experts": moe.shared_experts or None,
            "first_k_dense_replace": len(dense),
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
        }
    return config


_EXPERTS: dict[Family, tuple[str, ...]] = {
    "mixtral": ("num_local_experts", "num_experts"),
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "olmoe": ("num_experts", "num_local_experts"),
    "deepseek": ("n_routed_experts",),
}
"""Keys of the number of experts: transformers 4's files first, then what transformers 5 writes."""

_EXPERT_WIDTH: dict[Family, str] = {
    "mixtral": "intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
    "olmoe": "intermediate_size",
    "deepseek": "moe_intermediate_size",
}


_DENSE_WIDTH: tuple[Family, ...] = ("qwen3_moe", "deepseek", "llama")
"""Families whose `intermediate_size` is the width of dense layers."""

_HEAD_WIDTH: tuple[Family, ...] = ("mixtral", "qwen3_moe", "llama")
"""Families whose heads may be wider or narrower than d_model / heads."""


def _experts(reader: _Reader, family: Family, layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of MoEConfig and those of RouterConfig."""
    num_experts = reader.integer(*_EXPERTS[family])
    top_k = reader.integer("num_experts_per_tok")
    balance = "aux_loss_alpha" if family == "deepseek" else "router_aux_loss_coef"
    normalized = family == "mixtral" or bool(reader.config.get("norm_topk_prob"))
    experts = {
        "experts": num_experts,
        "d_expert": reader.integer(_EXPERT_WIDTH[family]),
        "shared_experts": reader.integer("n_shared_experts", default=0) if family == "deepseek" else 0,
        **_which_layers(reader, family, layers, num_experts),
    }
    choice = {
        "top_k": top_k,
        "normalize": "top_k" if normalized else "none",
        # Deviation: theirs divides a single weight by itself, and the router never learns; ours keeps the
        # same weight of 1 with a gradient.
        "detach": top_k == 1,
        "balance_loss": float(reader.number(balance, default=0.0)),
    }
    return experts, choice


def _refuse_what_differs(reader: _Reader, family: Family) -> None:
    """Notes the keys that change the model in ways that ours does not have."""
    reader.only("hidden_act", "silu", "swish", why="is another activation than SwiGLU's")
    reader.only("attention_bias", False, why="adds biases to the projections")
    reader.only("mlp_bias", False, why="adds biases to the feed-forward networks")
    reader.only("attention_dropout", 0, why="drops attention weights in training")
    reader.only("router_jitter_noise", 0, why="disturbs the experts' inputs too, jitter here the router's alone")
    reader.only("clip_qkv", why="clips queries, keys and values")
    reader.only("quantization_config", why="stores quantized weights")
    if reader.config.get("use_sliding_window", True):
        reader.only("sliding_window", why="hides older tokens from attention")
    if reader.config.get("model_type") == "mistral" and "sliding_window" not in reader.config:
        reader.problems.append("sliding_window: missing, which is 4096 in this family; only null can be carried over")
    if family == "deepseek":
        reader.only("moe_layer_freq", 1, why="interleaves dense layers in another rhythm")
        reader.only("scoring_func", "softmax", why="is no score of this family")
        reader.only("topk_method", "greedy", why="is no selection of this family")


def _rope_theta(reader: _Reader, family: Family) -> float:
    """Base of the rotary embedding, from where transformers 4 or 5 keeps it; only the plain kind is legal."""
    plain = _ROPE_THETA.get(family, 1e4)
    scaling = reader.config.get("rope_parameters") or reader.config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        reader.problems.append(f"rope_parameters: {scaling!r} is no mapping")
        return plain
    inside = _Reader(scaling)
    for name in ("rope_type", "type"):
        inside.only(name, "default", why="stretches the rotary embedding")
    inside.only("partial_rotary_factor", 1, why="turns only a part of each head")
    theta = float(inside.number("rope_theta", default=reader.number("rope_theta", default=plain)))
    reader.problems += [f"rope_parameters.{problem}" for problem in inside.problems]
    return theta


def _which_layers(reader: _Reader, family: Family, layers: int, experts: int) -> dict[str, Any]:
    """The fields of MoEConfig that say which layers have experts; the others are dense."""
    if family == "deepseek":
        return {"first_dense": reader.integer("first_k_dense_replace", default=0)}
    if family != "qwen3_moe":
        return {}
    every = max(1, reader.integer("decoder_sparse_step", default=1))
    listed = reader.config.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
        reader.problems.append(f"mlp_only_layers: {listed!r} is no list of layer numbers")
        return {}
    dense = frozenset(listed)
    theirs = [layer for layer in range(layers) if layer not in dense and (layer + 1) % every == 0]
    if not theirs:
        reader.problems.append(f"mlp_only_layers: with decoder_sparse_step: {every} no layer has experts")
        return {}
    first = theirs[0]
    if theirs == [layer for layer in range(first, layers) if (layer + 1) % every == 0]:
        # A dense layer more or less between two steps says the same: take the plainest number.
        return {"every": every, "first_dense": first if first >= every else 0}
    return {
        "per_layer": tuple(experts if layer in theirs else 0 for layer in range(layers)),
        "dense": tuple(layer for layer in range(layers) if layer not in theirs),
    }


_EXPORT = "`wastenot compress export` writes such models"


def _not_said_by_any(model: ModelConfig, router: RouterConfig) -> Iterator[str]:
    """What no family can say."""
    if bare := [layer for layer in range(model.layers) if not model.has_ffn(layer)]:
        yield f"model.moe.per_layer: layers {bare} have no feed-forward network, stock layers have one; {_EXPORT}"
    if not model.expert_counts:
        # A dense model reads nothing of what is said of the router.
        return
    if len(set(model.expert_counts.values())) > 1:
        fewest, most = min(model.expert_counts.values()), max(model.expert_counts.values())
        yield f"model.moe.per_layer: layers have {fewest} to {most} experts, stock layers equally many; {_EXPORT}"
    if router.kind != "learned":
        yield f"router.kind: {router.kind} is for benchmarks; stock routers are learned"
    if router.score != "softmax":
        yield f"router.score: {router.score} is not stock routers' softmax"
    if router.groups > 1:
        yield f"router.groups: {router.groups} limits the choice of experts; stock routers choose among all"
    if router.scale != 1:
        yield f"router.scale: {router.scale} has no key in config.json"
    if router.bias_update > 0:
        yield f"router.bias_update: {router.bias_update} steers by a selection bias, for which there is no weight"


def _not_said_by(family: Family, model: ModelConfig, router: RouterConfig) -> Iterator[str]:
    """What this family cannot say."""
    moe = model.moe
    if model.qk_norm != _QK_NORM[family]:
        yield f"model.qk_norm: {model.qk_norm} is not this family's {_QK_NORM[family]}"
    if family in ("olmoe", "deepseek") and model.head_width * model.heads != model.d_model:
        yield f"model.d_head: {model.head_width} is not this family's d_model / heads"
    if family == "llama" and model.d_model % model.heads:
        yield f"model.heads: {model.heads} does not divide d_model: {model.d_model}, as this family's must"
    if moe is None or not model.expert_counts:
        if has_experts(family):
            yield f"model.moe: {'null has no' if moe is None else 'no layer has'} experts; use the llama family"
        return
    if not has_experts(family):
        yield f"model.moe: {moe.experts} experts are more than this family's null; use the family of such a model"
        return
    if family == "mixtral" and router.normalize == "none":
        yield "router.normalize: none is not this family's top_k"
    if moe.shared_experts and family != "deepseek":
        yield f"model.moe.shared_experts: {moe.shared_experts} is more than this family's 0"
    dense = [layer for layer in range(model.layers) if model.is_dense(layer)]
    if dense and family in ("mixtral", "olmoe"):
        yield f"model.moe: layers {dense} are dense; all of this family have experts"
    if moe.every > 1 and family == "deepseek":
        yield f"model.moe.every: {moe.every} has no key in this family's config.json"
    if moe.per_layer and family == "deepseek" and dense != list(range(len(dense))):
        yield f"model.moe.dense: {dense} are not the first layers, as the dense ones of this family are"
