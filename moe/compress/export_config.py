"""config.json of what is left of a model, as stock loaders read it. Torch-free.

Fields that count layers, index them or list something of each go with the layers: a stock loader fills what then has no
weights with random ones, and only warns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from .families import MODULES
from .plan import Shape

__all__ = ["MAY_BE_DENSE", "check_config", "rewritten"]

MAY_BE_DENSE: dict[str, Literal["none", "listed", "first"]] = {
    "mixtral": "none",
    "qwen2_moe": "listed",
    "qwen3_moe": "listed",
    "olmoe": "none",
    "deepseek_v2": "first",
    "deepseek_v3": "first",
}
"""Which layers a family can have without experts: none, those that `mlp_only_layers` lists, the first
`first_k_dense_replace`."""

_COUNTS: dict[str, tuple[str, ...]] = {
    "mixtral": ("num_local_experts",),
    "qwen2_moe": ("num_experts",),
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "olmoe": ("num_experts",),
    "deepseek_v2": ("n_routed_experts",),
    "deepseek_v3": ("n_routed_experts",),
}
"""Keys of the number of experts that are written: where transformers 4 and 5 differ, both."""

_ALL_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")

_LISTS = ("layer_types", "mlp_layer_types")
"""Keys whose value has one entry for each layer."""

_NEXT_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers", "num_nextn_layers")
"""Keys of the number of layers behind the last that predict further tokens. They go: what they read is gone."""


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where `config` says what stock models of our families do not do, or do in silence wrongly."""
    if config.get("quantization_config") is not None:
        raise ValueError(f"{where}: quantization_config: others quantized its weights; give the model in bf16 or fp32")
    if config.get("per_layer_config"):
        raise ValueError(
            f"{where}: per_layer_config: {config['per_layer_config']!r} changes no module of stock models, which would "
            f"get random weights instead; say it with a plan"
        )


def rewritten(
    config: Mapping[str, Any], family: str, shape: Shape, origin: Sequence[int], dense: Collection[int], width: int
) -> dict[str, Any]:
    """`config` of the base model as that of a model of `shape`, whose layer i was origin[i].

    dense: layers that are to be dense, of `width` hidden units; 0 leaves the width as it is.
    Raises ValueError where a list in `config` is not as long as the base model.
    """
    layers = config["num_hidden_layers"]
    new = {key: value for key, value in config.items() if key not in ("auto_map", "per_layer_config")}
    new |= {
        "architectures": [f"{MODULES[family].classes}ForCausalLM"],
        "model_type": family,
        "num_hidden_layers": len(origin),
    }
    for key, value in _explicit_lists(config, family, layers).items():
        if len(value) != layers:
            raise ValueError(f"{key}: has {len(value)} entries for {layers} layers; give one for each")
        new[key] = [value[layer] for layer in origin]
    if config.get("max_window_layers") is not None:
        new["max_window_layers"] = sum(layer < config["max_window_layers"] for layer in origin)
    if MAY_BE_DENSE[family] == "listed":
        # A step would fall on other layers once one before them is gone.
        new |= {"decoder_sparse_step": 1, "mlp_only_layers": sorted(dense)}
    elif MAY_BE_DENSE[family] == "first":
        new["first_k_dense_replace"] = len(dense)
    if width:
        new["intermediate_size"] = width
    if shape.moe_layers:
        count = shape.experts[shape.moe_layers[0]]
        new |= {key: count for key in _ALL_COUNTS if key in config or key in _COUNTS[family]}
        new["num_experts_per_tok"] = shape.top_k
    # transformers 5 means one such layer where deepseek_v3 does not say.
    new |= {key: 0 for key in _NEXT_TOKENS if key in config or (family, key) == ("deepseek_v3", _NEXT_TOKENS[0])}
    return new | _both_rotary(config)


def _explicit_lists(config: Mapping[str, Any], family: str, layers: int) -> dict[str, list[Any]]:
    """Lists with an entry for each layer, also one that the family derives from layers' numbers."""
    lists = {key: config[key] for key in _LISTS if isinstance(config.get(key), list)}
    if family == "qwen2_moe" and config.get("use_sliding_window") and "layer_types" not in lists:
        # As Qwen2MoeConfig has it: every other of the first layers, counted in the base model.
        kinds = [layer % 2 == 0 and layer < config.get("max_window_layers", 28) for layer in range(layers)]
        lists["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in kinds]
    return lists


def _both_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding where transformers 4 reads it, if only the place where 5 does is filled."""
    given = config.get("rope_parameters")
    if not isinstance(given, Mapping) or "rope_theta" not in given:
        return {}
    both: dict[str, Any] = {"rope_theta": given["rope_theta"]}
    if given.get("rope_type", "default") != "default":
        both["rope_scaling"] = {key: value for key, value in given.items() if key != "rope_theta"}
    return both
