"""The shape of a model, layers and experts, from what describes it: a config.json or our ModelConfig. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config import ModelConfig, RouterConfig
from .places import family_of
from .plan import Shape

__all__ = ["model_of_shape", "shape_of_config", "shape_of_model"]


@dataclass(frozen=True)
class _Keys:
    """Where a family's config.json says what, and what it means where it does not."""

    experts: tuple[str, ...]
    """transformers 4's key first, then what transformers 5 writes."""
    top_k: int
    """Where no `num_experts_per_tok` is."""
    every: str | None = None
    """Key of: of each so many layers the last is MoE."""
    listed: str | None = None
    """Key of the list of layers that are dense."""
    first: str | None = None
    """Key of how many of the first layers are dense."""
    first_usual: int = 0
    groups: tuple[int, int] | None = None
    """`n_group` and `topk_group` where they are not said, of families that have them."""
    grouping_method: str | None = None
    """`topk_method` under which groups count; None: always."""


_KEYS: dict[str, _Keys] = {
    "mixtral": _Keys(("num_local_experts", "num_experts"), 2),
    "qwen2_moe": _Keys(("num_experts", "num_local_experts"), 4, "decoder_sparse_step", "mlp_only_layers"),
    "qwen3_moe": _Keys(("num_experts", "num_local_experts"), 8, "decoder_sparse_step", "mlp_only_layers"),
    "olmoe": _Keys(("num_experts", "num_local_experts"), 8),
    "deepseek_v2": _Keys(
        ("n_routed_experts", "num_experts"),
        6,
        first="first_k_dense_replace",
        groups=(1, 1),
        grouping_method="group_limited_greedy",
    ),
    "deepseek_v3": _Keys(
        ("n_routed_experts", "num_local_experts", "num_experts"),
        8,
        first="first_k_dense_replace",
        first_usual=3,
        groups=(8, 4),
    ),
}


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """Layers and experts of the stock model that `config`, a parsed config.json of transformers 4 or 5, describes.

    Raises ValueError for a family that is not supported, a key that is missing or no number, and for what families
    here do not compute.
    """
    keys = _KEYS[family_of(config)]
    if config.get("moe_layer_freq", 1) != 1:
        raise ValueError(f"moe_layer_freq: {config['moe_layer_freq']} is no rhythm of this family; only 1 is supported")
    layers = _number(config, "num_hidden_layers")
    experts = _number(config, *keys.experts)
    dense = _dense_layers(config, keys, layers)
    groups = top_groups = 1
    if keys.groups and keys.grouping_method in (None, config.get("topk_method")):
        groups = _number(config, "n_group", default=keys.groups[0])
        top_groups = _number(config, "topk_group", default=keys.groups[1])
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(f"n_group: {experts} experts cannot be chosen from {top_groups} of {groups} groups")
    return Shape(
        experts=tuple(0 if layer in dense else experts for layer in range(layers)),
        top_k=_number(config, "num_experts_per_tok", default=keys.top_k),
        dense=dense,
        groups=groups,
        top_groups=top_groups,
    )


def shape_of_model(model: ModelConfig, router: RouterConfig) -> Shape:
    """Layers and experts of a model of ours."""
    return Shape(
        experts=tuple(map(model.num_experts, range(model.layers))),
        top_k=router.top_k,
        dense=tuple(filter(model.is_dense, range(model.layers))),
        groups=router.groups,
        top_groups=router.top_groups,
    )


def model_of_shape(model: ModelConfig, shape: Shape) -> ModelConfig:
    """`model`, a mixture, with the layers and experts of `shape`: said layer by layer only where layers differ."""
    assert model.moe is not None
    count = max(shape.experts)
    is_plain = count > 0 and min(shape.experts) == count
    moe = replace(
        model.moe,
        # Where no layer has experts nothing reads their number.
        experts=count or model.moe.experts,
        every=1,
        first_dense=0,
        per_layer=() if is_plain else shape.experts,
        dense=() if is_plain else shape.dense,
    )
    return replace(model, layers=shape.layers, moe=moe)


def _dense_layers(config: Mapping[str, Any], keys: _Keys, layers: int) -> tuple[int, ...]:
    every = max(1, _number(config, keys.every, default=1)) if keys.every else 1
    first = _number(config, keys.first, default=keys.first_usual) if keys.first else 0
    listed = (config.get(keys.listed) or []) if keys.listed else []
    if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
        raise ValueError(f"{keys.listed}: {listed!r} is no list of layer numbers")
    return tuple(layer for layer in range(layers) if layer < first or layer in listed or (layer + 1) % every)


def _number(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of `names` that is there; ValueError where none is, or it is no whole number."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            raise ValueError(f"{name}: {value!r} is no whole number")
    if default is None:
        raise ValueError(f"{names[0]}: missing; config.json must say it")
    return default
