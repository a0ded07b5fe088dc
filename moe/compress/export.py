"""What is left of a model as a checkpoint that stock models load: no remote code, nothing that would load wrongly.

Block Drop renumbers. Layer Drop leaves a dense network of zeros where the family can say which layers are dense, as
far as it can. Expert Drop needs as many experts in each layer. What a family cannot say is refused, with the nearest
plan that it can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.huggingface import CONFIG, INDEX, WEIGHTS
from .export_config import MAY_BE_DENSE, rewritten
from .export_quantized import quantization_config
from .export_source import EXPORTED, Lazy, Source, check_source, zeros
from .families import MODULES
from .partial import Partial, check_target
from .places import places_of
from .reexpress import REEXPRESSED, as_qwen2_moe

__all__ = ["Exported", "Loader", "export"]

Loader = Literal["hf", "vllm"]

_SHARD_BYTES = 4 * 2**30
_STUB_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    target: str
    family: str
    parameters: int
    bytes: int
    stubs: tuple[int, ...]
    """Layers whose feed-forward network is a dense one of zeros."""
    zeroed: tuple[int, ...]
    """Layers that keep all experts, of zeros: right, and as large as before."""
    width: int
    """Hidden units of the stubs; 0 without any."""


@dataclass(frozen=True)
class _Route:
    """How layers that only attend are written."""

    source: Source
    stubs: tuple[int, ...]
    zeroed: tuple[int, ...]
    width: int
    """Of dense layers; 0: as the source says."""


def export(
    source: Source,
    target: Path | str,
    *,
    loader: Loader = "hf",
    allow_zeroed: bool = False,
    stub_width: int | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> Exported:
    """Writes `source` to the folder `target`, which appears when it is complete; goes on where a process before this
    one was interrupted.

    allow_zeroed: write layers that the family cannot do without as experts of zeros; stub_width: hidden units of
    dense networks of zeros, where the model leaves that free (None: 128, which groups of quantization and tensor ranks
    divide, or an expert's if it has fewer); shard_bytes: of one file, and held in memory.

    Raises ValueError where nothing stock computes the model, tensors are missing, or `target` is not empty.
    """
    target = Path(target)
    check_target(target)
    if stub_width is not None and stub_width < 1:
        raise ValueError(f"stub_width: {stub_width} is too small; use 1 or more, for example 128")
    _check_counts(source)
    route = _route(source, loader, allow_zeroed, stub_width)
    check_source(route.source)
    identity = {
        "source": source.fingerprint,
        "loader": loader,
        "allow_zeroed": allow_zeroed,
        "stub_width": stub_width,
        "shard_bytes": shard_bytes,
    }
    return _write(target, identity, route, source, shard_bytes)


def _write(target: Path, identity: Mapping[str, Any], route: _Route, source: Source, shard_bytes: int) -> Exported:
    written = route.source
    dense = {*written.shape.dense, *route.stubs}
    config = rewritten(written.config, written.family, written.shape, written.origin, dense, route.width)
    tensors = {**written.weights, **dict(_fillers(route))}
    if written.few:
        config["quantization_config"] = quantization_config(*written.few, _whole_modules(tensors))
    # Only now: the configuration may have refused.
    partial = Partial(target, identity, "export")
    parameters, size = _write_shards(partial, tensors, shard_bytes)
    partial.add(CONFIG, _json(config))
    about = {
        "version": 1,
        "from": source.family,
        "shape": asdict(source.shape),
        "origin": list(source.origin),
        "plans": list(source.plans),
        "stubs": list(route.stubs),
        "zeroed": list(route.zeroed),
    }
    partial.add(EXPORTED, _json(about))
    for path in source.companions:
        partial.copy(path, path.name)
    partial.complete()
    return Exported(
        target=str(target),
        family=written.family,
        parameters=parameters,
        bytes=size,
        stubs=route.stubs,
        zeroed=route.zeroed,
        width=_stub_width(route),
    )


def _check_counts(source: Source) -> None:
    """Raises ValueError unless all layers with experts have equally many, and a router that can choose among them."""
    shape = source.shape
    counts = [experts for experts in shape.experts if experts]
    if len(set(counts)) > 1:
        # On average as many, and as many in each group.
        equal = round(sum(counts) / len(counts) / shape.groups) * shape.groups
        raise ValueError(
            f"{source.where}: its layers have {min(counts)} to {max(counts)} experts, and stock models have one number "
            f"for all; the nearest plan keeps {equal} in each of the {len(counts)} layers, and a second one may cut "
            f"what is left here to {min(counts)}"
        )
    fewest = shape.groups * (MODULES[source.family].smallest_group if source.family in MODULES else 1)
    if counts and counts[0] < fewest:
        raise ValueError(
            f"{source.where}: {counts[0]} experts in {shape.groups} groups are too few for the stock router, which "
            f"reads {fewest // shape.groups} of each; the nearest plan keeps {fewest} in each layer"
        )


def _route(source: Source, loader: Loader, allow_zeroed: bool, stub_width: int | None) -> _Route:
    alone = source.attend_only
    config = source.config
    width = stub_width or min(_STUB_WIDTH, config.get("moe_intermediate_size") or config["intermediate_size"])
    if source.family == "deepseek" or (source.family in REEXPRESSED and alone):
        source = as_qwen2_moe(source, width, biases=loader == "vllm")
        if loader == "vllm":
            _check_vllm(source)
    possible = _may_be_dense(source)
    if wrong := sorted({*source.shape.dense} - possible):
        raise ValueError(f"{source.where}: layers {wrong} are dense, which no {source.family} model can say")
    stubs = tuple(layer for layer in alone if layer in possible)
    zeroed = tuple(layer for layer in alone if layer not in possible)
    if zeroed and not allow_zeroed:
        raise ValueError(f"{source.where}: {_why_not(source, zeroed)}")
    if zeroed and source.few:
        raise ValueError(
            f"{source.where}: layers {list(zeroed)} would have experts of zeros, and others are in few bits, which no "
            f"stock model mixes; export what is cut, then quantize that"
        )
    if zeroed and not source.shape.moe_layers:
        raise ValueError(
            f"{source.where}: no layer has experts any more, and the {source.family} family needs one; keep those of "
            f"layer {zeroed[0]}"
        )
    return _Route(source, stubs, zeroed, width if stubs and not source.shape.dense else 0)


def _may_be_dense(source: Source) -> set[int]:
    """Layers without experts that the family can do without."""
    without = [layer for layer, experts in enumerate(source.shape.experts) if not experts]
    kind = MAY_BE_DENSE[source.family]
    if kind == "none":
        return set()
    return {layer for position, layer in enumerate(without) if kind == "listed" or layer == position}


def _why_not(source: Source, zeroed: tuple[int, ...]) -> str:
    origin = [source.origin[layer] for layer in zeroed]
    zeros_instead = "or take --allow-zeroed, which is right but saves nothing"
    if MAY_BE_DENSE[source.family] == "none":
        return (
            f"layers {origin} of the base have no experts, and models of the {source.family} family have some in all; "
            f"the nearest plan drops these layers as whole blocks, {zeros_instead}"
        )
    first = [layer for layer in range(source.shape.layers) if source.shape.experts[layer] or layer in zeroed]
    nearest = [source.origin[layer] for layer in first[: len(zeroed)]]
    return (
        f"layers {origin} of the base have no experts, and only the first layers of that family can be "
        f"without; the nearest plans drop the experts of layers {nearest}, or layers {origin} as whole blocks; "
        f"{zeros_instead}"
    )


def _check_vllm(source: Source) -> None:
    """Raises ValueError where vLLM's Qwen2-MoE reads less of config.json than transformers'."""
    if "head_dim" in source.config:
        raise ValueError(
            f"{source.where}: heads of width {source.config['head_dim']}; as Qwen2-MoE vLLM takes hidden_size / "
            f"num_attention_heads for it. Export for hf, or drop whole blocks"
        )


def _stub_width(route: _Route) -> int:
    """Hidden units of stubs: those of the other dense layers, where there are any."""
    if not route.stubs or route.width:
        return route.width
    return route.source.weights[f"model.layers.{route.source.shape.dense[0]}.mlp.gate_proj.weight"].shape[0]


def _fillers(route: _Route) -> Iterator[tuple[str, Lazy]]:
    """What layers that only attend hold in stock models: a norm of ones, and networks of zeros."""
    source, width = route.source, _stub_width(route)
    dtype, D = source.dtype, source.weights["model.norm.weight"].shape[0]
    for layer in (*route.stubs, *route.zeroed):
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        yield name, Lazy((D,), lambda: torch.ones(D, dtype=dtype))
    for layer in route.stubs:
        yield f"model.layers.{layer}.mlp.gate_proj.weight", zeros((width, D), dtype)
        yield f"model.layers.{layer}.mlp.up_proj.weight", zeros((width, D), dtype)
        yield f"model.layers.{layer}.mlp.down_proj.weight", zeros((D, width), dtype)
    if not route.zeroed:
        return
    pattern = source.shape.moe_layers[0]
    for name, place in places_of(source.weights, source.family, source.shape.layers).items():
        if place.layer == pattern and place.part not in ("attention", "norm"):
            for layer in route.zeroed:
                other = name.replace(f"model.layers.{pattern}.", f"model.layers.{layer}.")
                yield other, zeros(source.weights[name].shape, dtype)


def _write_shards(partial: Partial, tensors: Mapping[str, Lazy], shard_bytes: int) -> tuple[int, int]:
    """Writes safetensors of up to `shard_bytes` (or one tensor), and their index; returns (elements, bytes)."""
    left = sorted(tensors, key=_natural)
    notes: list[dict[str, Any]] = []
    while left:
        file = f"{len(notes)}.safetensors"
        if file not in partial.finished:
            ahead = {name: tensors[name] for name in left}
            partial.write(file, lambda path, ahead=ahead: _write_shard(path, ahead, shard_bytes))
        notes.append(partial.finished[file])
        left = left[notes[-1]["weights"] :]
    # How many there are was not known before.
    names = [WEIGHTS] if len(notes) == 1 else list(_file_names(len(notes)))
    for number, name in enumerate(names):
        (partial.path / f"{number}.safetensors").rename(partial.path / name)
    size = sum(note["bytes"] for note in notes)
    if len(notes) > 1:
        weight_map = {tensor: name for name, note in zip(names, notes, strict=True) for tensor in note["tensors"]}
        partial.add(INDEX, _json({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return sum(note["elements"] for note in notes), size


def _write_shard(path: Path, tensors: Mapping[str, Lazy], shard_bytes: int) -> dict[str, Any]:
    """Writes the first of `tensors`, as many as fit; returns how many, and what the file holds."""
    shard: dict[str, Tensor] = {}
    weights = size = elements = 0
    for name, lazy in tensors.items():
        parts = lazy.packed(name) if lazy.packed else {name: lazy.read().contiguous()}
        num_bytes = sum(part.numel() * part.element_size() for part in parts.values())
        if shard and size + num_bytes > shard_bytes:
            break
        shard |= parts
        weights, size, elements = weights + 1, size + num_bytes, elements + prod(lazy.shape)
    save_file(shard, path, {"format": "pt"})
    return {"weights": weights, "tensors": list(shard), "bytes": size, "elements": elements}


def _whole_modules(tensors: Mapping[str, Lazy]) -> list[str]:
    """What would be a linear layer in few bits to a loader, and is not."""
    return [
        name.removesuffix(".weight")
        for name in sorted(tensors, key=_natural)
        if len(tensors[name].shape) == 2 and not tensors[name].packed and name != "model.embed_tokens.weight"
    ]


def _file_names(count: int) -> Iterable[str]:
    return (f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
