"""Which part of a model each tensor of a checkpoint is, and what it is called, in every family. Torch-free.

Families are data: names of a block's tensors, theirs to ours. A name that no family knows is an error, so that nothing
is kept or dropped by accident; and a router is a router by its whole name, never an expert's gate (a substring is not
enough: mixtral's `gate`, qwen's `shared_expert_gate` and an expert's `gate_proj` all hold one).

    place = place_of("model.layers.3.mlp.experts.5.down_proj.weight", "qwen3_moe", layers=48)
    place == Place(layer=3, part="expert", weight="down", expert=5)
    name_of(place, "mixtral") == "model.layers.3.block_sparse_moe.experts.5.w2.weight"
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["FAMILIES", "NATIVE", "Part", "Place", "family_of", "name_of", "place_of", "places_of"]

Part = Literal[
    "outside", "attention", "norm", "router", "router_bias", "expert", "experts", "shared", "dense", "next_n"
]
"""outside: of no layer. norm: what the router and the experts (or a dense network) read through. router: [E, D].
router_bias: [E], steers selection. expert: of one. experts: of all, [E, ...]. dense: instead of experts. next_n: of a
layer behind the last, which predicts further tokens."""

_LINEAR = frozenset({"q", "k", "v", "out", "q_a", "q_b", "kv_a", "kv_b", "gate", "up", "gate_up", "down"})
_LISTED = 8
"""Names an error message lists before it only counts."""


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs, in words that are the same for all families."""

    layer: int | None
    """None: outside of all."""
    part: Part
    weight: str
    """Which of that part: `q`, `down`, ...; of `next_n` what follows the layer's number in its name."""
    expert: int | None = None
    leaf: str = "weight"
    """How its name ends: `weight`, `bias`, `weight_scale_inv`; empty where the weight's name is all."""

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix, or the stack of them, of a linear layer within a block: no router, no gate over
        shared experts, no norm, neither embedding nor output layer."""
        matrix = self.leaf == "weight" or self.part == "experts"
        return matrix and self.weight in _LINEAR and self.part in ("attention", "expert", "experts", "shared", "dense")


@dataclass(frozen=True)
class _Named:
    part: Part
    weight: str
    leaves: tuple[str, ...] = ("weight",)


_WITH_BIAS = ("weight", "bias")
# Checkpoints in fp8 have a scale beside each matrix.
_SCALED = ("weight", "bias", "weight_scale_inv")


@dataclass(frozen=True)
class _Names:
    """What a family calls its tensors; `{}` stands for the number of an expert."""

    block: Mapping[str, _Named]
    """What follows a layer's number, without the leaf."""
    next_n: tuple[str, ...] = ()
    """... of what else there is in a layer behind the last, with the leaf."""
    layers: str = "model.layers"
    outside: Mapping[str, str] = field(
        default_factory=lambda: {
            "model.embed_tokens.weight": "embedding",
            "model.norm.weight": "norm",
            "lm_head.weight": "head",
        }
    )

    @property
    def by_name(self) -> dict[str, tuple[Part, str, str]]:
        """What follows a layer's number -> part, weight, leaf."""
        return {
            f"{stem}.{leaf}" if leaf else stem: (named.part, named.weight, leaf)
            for stem, named in self.block.items()
            for leaf in named.leaves
        }

    @property
    def by_place(self) -> dict[tuple[Part, str, str], str]:
        return {place: name for name, place in self.by_name.items()}


_PARTS = ("gate", "up", "down")


def _mlp(
    stem: str,
    part: Part,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    leaves: tuple[str, ...] = ("weight",),
) -> dict[str, _Named]:
    """The three matrices of a SwiGLU."""
    return {f"{stem}.{name}": _Named(part, weight, leaves) for name, weight in zip(names, _PARTS, strict=True)}


def _norms(**names: str) -> dict[str, _Named]:
    return {f"self_attn.{name}": _Named("attention", weight) for name, weight in names.items()}


def _attention(leaves: tuple[str, ...] = ("weight",)) -> dict[str, _Named]:
    """Queries, keys and values of their own, and what all families have around attention."""
    theirs = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
    return {
        "input_layernorm": _Named("attention", "norm"),
        **{f"self_attn.{name}": _Named("attention", weight, leaves) for name, weight in theirs.items()},
        # Old checkpoints keep the frequencies, which follow from theta.
        "self_attn.rotary_emb.inv_freq": _Named("attention", "inv_freq", ("",)),
        "post_attention_layernorm": _Named("norm", "norm"),
    }


def _latent_attention() -> dict[str, _Named]:
    """Low-rank queries, keys and values; small models have whole queries."""
    theirs = {"q_proj": "q", "q_a_proj": "q_a", "q_b_proj": "q_b", "kv_a_proj_with_mqa": "kv_a", "kv_b_proj": "kv_b"}
    plain = _attention()
    return {
        "input_layernorm": plain["input_layernorm"],
        **{f"self_attn.{name}": _Named("attention", weight, _SCALED) for name, weight in theirs.items()},
        "self_attn.o_proj": _Named("attention", "out", _SCALED),
        **_norms(q_a_layernorm="q_a_norm", kv_a_layernorm="kv_a_norm"),
        "self_attn.rotary_emb.inv_freq": plain["self_attn.rotary_emb.inv_freq"],
        "post_attention_layernorm": plain["post_attention_layernorm"],
    }


_ROUTER = {"mlp.gate": _Named("router", "router")}
_EXPERTS = _mlp("mlp.experts.{}", "expert")
_DENSE = _mlp("mlp", "dense")
_DEEPSEEK = {
    **_latent_attention(),
    **_ROUTER,
    **_mlp("mlp.experts.{}", "expert", leaves=_SCALED),
    **_mlp("mlp.shared_experts", "shared", leaves=_SCALED),
    **_mlp("mlp", "dense", leaves=_SCALED),
}

NATIVE = "wastenot"
"""The names in checkpoints of our runs."""

_NAMES: dict[str, _Names] = {
    "mixtral": _Names(
        {
            **_attention(),
            "block_sparse_moe.gate": _Named("router", "router"),
            **_mlp("block_sparse_moe.experts.{}", "expert", ("w1", "w3", "w2")),
        }
    ),
    "qwen2_moe": _Names(
        {
            **_attention(_WITH_BIAS),
            **_ROUTER,
            **_EXPERTS,
            **_mlp("mlp.shared_expert", "shared"),
            "mlp.shared_expert_gate": _Named("shared", "shared_gate"),
            **_DENSE,
        }
    ),
    "qwen3_moe": _Names(
        {**_attention(_WITH_BIAS), **_norms(q_norm="q_norm", k_norm="k_norm"), **_ROUTER, **_EXPERTS, **_DENSE}
    ),
    "olmoe": _Names({**_attention(_WITH_BIAS), **_norms(q_norm="q_norm", k_norm="k_norm"), **_ROUTER, **_EXPERTS}),
    "deepseek_v2": _Names(_DEEPSEEK),
    "deepseek_v3": _Names(
        {**_DEEPSEEK, "mlp.gate.e_score_correction_bias": _Named("router_bias", "bias", ("",))},
        next_n=(
            "embed_tokens.weight",
            "enorm.weight",
            "hnorm.weight",
            "eh_proj.weight",
            "eh_proj.weight_scale_inv",
            "shared_head.norm.weight",
            "shared_head.head.weight",
        ),
    ),
    NATIVE: _Names(
        {
            "attention_norm": _Named("attention", "norm"),
            **{f"attention.{name}": _Named("attention", name) for name in ("q", "k", "v", "out", "q_norm", "k_norm")},
            "ffn_norm": _Named("norm", "norm"),
            "ffn.router": _Named("router", "router"),
            "ffn.router.bias_E": _Named("router_bias", "bias", ("",)),
            "ffn.experts.gate_up": _Named("experts", "gate_up", ("",)),
            "ffn.experts.down": _Named("experts", "down", ("",)),
            **_mlp("ffn.shared", "shared", _PARTS),
            **_mlp("ffn", "dense", _PARTS),
        },
        layers="model.blocks",
        outside={"model.embedding.weight": "embedding", "model.norm.weight": "norm", "model.head.weight": "head"},
    ),
}

FAMILIES: tuple[str, ...] = tuple(family for family in _NAMES if family != NATIVE)
"""Values of `model_type` in config.json."""

_BY_NAME = {family: names.by_name for family, names in _NAMES.items()}
_BY_PLACE = {family: names.by_place for family, names in _NAMES.items()}
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def family_of(config: Mapping[str, Any]) -> str:
    """The family of the model that a parsed config.json describes. Raises ValueError for one that is none of ours."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type: {family!r} cannot be compressed; supported are {', '.join(FAMILIES)}")
    return str(family)


def place_of(name: str, family: str, layers: int) -> Place:
    """Where the tensor `name` of a checkpoint of `family` (or `NATIVE`) with so many layers belongs.

    Raises ValueError where the family has no such tensor.
    """
    place = _find(name, _NAMES[family], _BY_NAME[family], layers)
    if place is None:
        raise _unknown([name], family, layers)
    return place


def places_of(names: Iterable[str], family: str, layers: int) -> dict[str, Place]:
    """As `place_of`, of many; raises one ValueError that lists all that are unknown."""
    table, found = _NAMES[family], {}
    unknown: list[str] = []
    for name in names:
        place = _find(name, table, _BY_NAME[family], layers)
        if place is None:
            unknown.append(name)
        else:
            found[name] = place
    if unknown:
        raise _unknown(sorted(unknown), family, layers)
    return found


def name_of(place: Place, family: str) -> str:
    """What `family` (or `NATIVE`) calls the tensor of `place`. Raises ValueError where it has none such."""
    names = _NAMES[family]
    if place.part == "outside":
        for name, weight in names.outside.items():
            if weight == place.weight:
                return name
    elif place.part == "next_n":
        if names.next_n:
            return f"{names.layers}.{place.layer}.{place.weight}"
    elif stem := _BY_PLACE[family].get((place.part, place.weight, place.leaf)):
        return f"{names.layers}.{place.layer}.{stem.format(place.expert)}"
    raise ValueError(f"models of the {family} family have no {place.part} {place.weight} {place.leaf}".rstrip())


def _find(name: str, names: _Names, by_name: Mapping[str, tuple[Part, str, str]], layers: int) -> Place | None:
    if name in names.outside:
        return Place(None, "outside", names.outside[name])
    inside = re.fullmatch(rf"{re.escape(names.layers)}\.(\d+)\.(.+)", name)
    if inside is None:
        return None
    layer, rest = int(inside[1]), inside[2]
    number = _EXPERT.search(rest)
    stem = _EXPERT.sub("{}", rest) if number else rest
    if layer >= layers:
        is_known = bool(names.next_n) and (rest in names.next_n or stem in by_name)
        return Place(layer, "next_n", rest, leaf="") if is_known else None
    if stem not in by_name:
        return None
    part, weight, leaf = by_name[stem]
    return Place(layer, part, weight, int(number[0]) if number else None, leaf)


def _unknown(names: list[str], family: str, layers: int) -> ValueError:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ValueError(
        f"no tensors of a {family} model with {layers} layers: {', '.join(names[:_LISTED])}{more}; remove them, or "
        f"correct config.json"
    )
