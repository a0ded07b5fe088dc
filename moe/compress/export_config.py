"""config.json of what is left of a model, as stock loaders read it: data per family, and one rewriting. Torch-free.

Fields that count layers, index them or list something of each go with the layers; what is left out here a stock
loader would fill with defaults or random weights, and only warn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .plan import Shape

__all__ = ["STOCK", "StockFamily", "base_shape", "rewritten", "stock_family"]


@dataclass(frozen=True, kw_only=True)
class StockFamily:
    """How the config.json of a family says what plans cut, and its tensors what experts are called."""

    architecture: str | None
    """Class of transformers; None where it has none, and models need remote code."""
    counts: tuple[str, ...]
    """Keys of the number of experts: the one that transformers 4 reads first, then those that transformers 5 writes."""
    dense: Literal["never", "listed", "first"]
    """Which layers may be dense: none; those of `mlp_only_layers`; the first `first_k_dense_replace`."""
    block: str = "mlp"
    """Name of the module with router and experts."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Of an expert: gate, up, down."""
    extra: tuple[str, ...] = ()
    """Keys that transformers 5 gives a value which is wrong here where they are absent, set to 0."""


STOCK: dict[str, StockFamily] = {
    "mixtral": StockFamily(
        architecture="MixtralForCausalLM",
        counts=("num_local_experts", "num_experts"),
        dense="never",
        block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    ),
    "qwen2_moe": StockFamily(architecture="Qwen2MoeForCausalLM", counts=("num_experts",), dense="listed"),
    "qwen3_moe": StockFamily(
        architecture="Qwen3MoeForCausalLM", counts=("num_experts", "num_local_experts"), dense="listed"
    ),
    "olmoe": StockFamily(architecture="OlmoeForCausalLM", counts=("num_experts", "num_local_experts"), dense="never"),
    "deepseek_v2": StockFamily(
        architecture="DeepseekV2ForCausalLM", counts=("n_routed_experts", "num_experts"), dense="first"
    ),
    "deepseek_v3": StockFamily(
        architecture="DeepseekV3ForCausalLM",
        counts=("n_routed_experts", "num_local_experts"),
        dense="first",
        extra=("num_nextn_predict_layers",),
    ),
    "deepseek": StockFamily(architecture=None, counts=("n_routed_experts",), dense="first"),
}
"""By `model_type`. `deepseek` is DeepSeek-MoE-16B, whose models are only exported as qwen2_moe."""

_LISTS = ("layer_types", "mlp_layer_types")
"""Keys whose value has one entry for each layer."""

_NEXT_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers", "num_nextn_layers")
"""Keys of the number of layers behind the last that predict further tokens. They go: their own inputs are gone."""


def stock_family(config: Mapping[str, Any]) -> str:
    """The family of `config`, a parsed config.json. Raises ValueError where it is none of ours, or quantized."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in STOCK:
        raise ValueError(f"model_type: {kind!r} is no family known here; use one of {', '.join(STOCK)}")
    if config.get("quantization_config") is not None:
        raise ValueError("quantization_config: quantized checkpoints cannot be exported yet; give the unquantized one")
    if config.get("per_layer_config"):
        raise ValueError("per_layer_config: the models of transformers ignore it, or refuse to load; remove it")
    return kind


def base_shape(config: Mapping[str, Any], family: str) -> Shape:
    """What a stock model of `config` consists of. Raises ValueError where a key is missing, or of another kind."""
    stock = STOCK[family]
    experts = _whole(config, *stock.counts)
    layers = range(_whole(config, "num_hidden_layers"))
    if stock.dense == "listed":
        listed = _list_of_layers(config, "mlp_only_layers")
        step = _whole(config, "decoder_sparse_step", default=1)
        dense = tuple(layer for layer in layers if layer in listed or (layer + 1) % step)
    elif stock.dense == "first":
        # The default of deepseek_v3 is another one, which its files never leave to chance.
        first = _whole(config, "first_k_dense_replace", default=None if family == "deepseek_v3" else 0)
        dense = tuple(layers[:first])
    else:
        dense = ()
    return Shape(
        experts=tuple(0 if layer in dense else experts for layer in layers),
        top_k=_whole(config, "num_experts_per_tok"),
        dense=dense,
        groups=_whole(config, "n_group", default=1),
        top_groups=_whole(config, "topk_group", default=1),
    )


def rewritten(
    config: Mapping[str, Any], family: str, shape: Shape, origin: Sequence[int], dense: Collection[int], width: int
) -> dict[str, Any]:
    """`config` of the base model as that of a model of `shape`, whose layer i was origin[i].

    dense: layers that are to be dense, of `width` hidden units; 0 leaves the width as it is.
    Raises ValueError where a list in `config` is not as long as the base model.
    """
    stock = STOCK[family]
    new = {key: value for key, value in config.items() if key != "auto_map"}
    new |= {"architectures": [stock.architecture], "model_type": family, "num_hidden_layers": len(origin)}
    layers = _whole(config, "num_hidden_layers")
    for key, value in _explicit_lists(config, family, layers).items():
        if len(value) != layers:
            raise ValueError(f"{key}: has {len(value)} entries for {layers} layers; give one for each")
        new[key] = [value[layer] for layer in origin]
    if config.get("max_window_layers") is not None:
        new["max_window_layers"] = sum(layer < _whole(config, "max_window_layers") for layer in origin)
    if stock.dense == "listed":
        # A step would fall on other layers once one before them is gone.
        new |= {"decoder_sparse_step": 1, "mlp_only_layers": sorted(dense)}
    elif stock.dense == "first":
        new["first_k_dense_replace"] = len(dense)
    if width:
        new["intermediate_size"] = width
    counts = {experts for experts in shape.experts if experts}
    if counts:
        new |= dict.fromkeys(stock.counts, max(counts))
        new["num_experts_per_tok"] = shape.top_k
    for key in _NEXT_TOKENS:
        if key in config or key in stock.extra:
            new[key] = 0
    return new | _both_rotary(config)


def _explicit_lists(config: Mapping[str, Any], family: str, layers: int) -> dict[str, list[Any]]:
    """Lists with an entry for each layer, also one that the family derives from layers' numbers."""
    lists = {key: config[key] for key in _LISTS if isinstance(config.get(key), list)}
    if family == "qwen2_moe" and config.get("use_sliding_window") and "layer_types" not in lists:
        # As Qwen2MoeConfig has it: every other of the first layers, counted from the base model's first.
        last = _whole(config, "max_window_layers", default=28)
        kinds = [layer < last and layer % 2 == 0 for layer in range(layers)]
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


def _whole(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of `names` that is there."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}: {value!r} is no whole number, and stock loaders take no other; use one for all")
        return value
    if default is None:
        raise ValueError(f"{names[0]}: missing")
    return default


def _list_of_layers(config: Mapping[str, Any], name: str) -> list[int]:
    value = config.get(name) or []
    if not isinstance(value, list) or not all(isinstance(layer, int) for layer in value):
        raise ValueError(f"{name}: {value!r} is no list of layer numbers")
    return value
