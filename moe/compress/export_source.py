"""What is exported: a Hugging Face folder, stock or compressed, or a model of ours, as names and tensors on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.huggingface import CONFIG, StoredWeights, config_to_huggingface, to_huggingface
from ..adapters.huggingface_names import Family
from ..config import ModelConfig, RouterConfig
from ..decoder import Decoder
from ..layer import MoELayer
from .export_config import check_config
from .export_quantized import packed_tensors
from .fingerprint import stock_fingerprint
from .places import Place, places_of
from .plan import Shape
from .shapes import shape_of_model
from .stored import BASE_CONFIG, COMPRESSED, StoredTensor, read_stock

__all__ = ["EXPORTED", "Lazy", "Source", "check_source", "from_decoder", "open_folder", "zeros"]

EXPORTED = "exported.json"
"""What an export says of how it came about; stock loaders do not read it."""

_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of the files of tokenizers and of generation_config.json."""


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read, or made, when it is written."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    packed: Callable[[str], dict[str, Tensor]] | None = None
    """Of a weight in few bits: its name -> the tensors that stand for it in stock checkpoints. `read` is not called."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as the tensors that a family's checkpoints have, layers and experts numbered from 0."""

    where: str
    """For messages."""
    fingerprint: str
    """Of the checkpoint."""
    family: str
    """A `model_type`; `deepseek`, whose models need remote code, is only ever exported as another."""
    config: Mapping[str, Any]
    """config.json of the base model."""
    shape: Shape
    origin: tuple[int, ...]
    """Number of each layer in the base model."""
    weights: Mapping[str, Lazy]
    dtype: torch.dtype
    few: tuple[int, int] | None = None
    """Bits of weights in few bits, and neighbours that share a scale (0: a whole row); None: there are none."""
    companions: tuple[Path, ...] = ()
    """Files that go with it unchanged."""
    plans: tuple[str, ...] = ()

    @property
    def attend_only(self) -> tuple[int, ...]:
        """Layers with neither experts nor a dense feed-forward network."""
        shape = self.shape
        return tuple(layer for layer, experts in enumerate(shape.experts) if not experts and layer not in shape.dense)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
    """Made when it is written."""
    return Lazy(shape, partial(torch.zeros, shape, dtype=dtype))


def open_folder(folder: Path | str) -> Source:
    """The checkpoint at `folder`: stock, or what `apply` made of one.

    Raises ValueError where it is neither, or a file is damaged.
    """
    stock = read_stock(folder)
    check_config(stock.config, str(stock.config_file))
    stored, tensors = StoredWeights(stock.path), stock.tensors
    # A weight in few bits is two tensors; what they stand for is a matrix like another.
    names = dict.fromkeys(name.removesuffix(".q").removesuffix(".scale") for name in tensors)
    places = places_of(names, stock.family, stock.shape.layers)
    if "model.norm.weight" not in names:
        raise ValueError(f"{folder}: model.norm.weight is missing")
    dtype, few = stored["model.norm.weight"].dtype, None
    weights: dict[str, Lazy] = {}
    for name, place in places.items():
        if place.part == "next_n" or place.weight == "inv_freq":
            continue
        if name in tensors:
            weights[name] = Lazy(tensors[name].shape, partial(stored.__getitem__, name))
        else:
            weights[name], few = _few_bits(stored, tensors, name, dtype)
    return Source(
        where=str(folder),
        fingerprint=stock_fingerprint(stock),
        family=stock.family,
        config=stock.config,
        shape=stock.shape,
        origin=stock.origin,
        weights=weights,
        dtype=dtype,
        few=few,
        companions=_companions(stock.path),
        plans=stock.plans,
    )


def _few_bits(
    stored: StoredWeights, tensors: Mapping[str, StoredTensor], name: str, dtype: torch.dtype
) -> tuple[Lazy, tuple[int, int]]:
    """The weight `name`, stored as codes and scales, and its (bits, group)."""
    missing = [part for part in (f"{name}.q", f"{name}.scale") if part not in tensors]
    if missing:
        raise ValueError(f"{stored.folder}: {missing[0]} is missing")
    q, scale = tensors[f"{name}.q"], tensors[f"{name}.scale"]
    in_byte = 2 if q.dtype == "U8" else 1
    shape = (q.shape[0], in_byte * q.shape[1])

    def packed(as_name: str) -> dict[str, Tensor]:
        return packed_tensors(as_name, stored[f"{name}.q"], stored[f"{name}.scale"], dtype)

    group = shape[1] // scale.shape[1] if in_byte == 2 else 0
    return Lazy(shape, partial(stored.__getitem__, f"{name}.q"), packed), (8 // in_byte, group)


def from_decoder(
    model: Decoder,
    router: RouterConfig,
    where: Path,
    *,
    fingerprint: str,
    max_positions: int,
    end_token: int | None,
    tokenizer: Path,
) -> Source:
    """A model of ours in this process, whole, as a checkpoint of the family that can say it.

    fingerprint: of its checkpoint; max_positions, end_token: see `config_to_huggingface`; tokenizer: folder of the
        tokenizer's files.
    Raises ValueError where no family can.
    """
    config, family = _said_by_family(model.config, router)
    for name, module in model.named_modules():
        if isinstance(module, MoELayer) and module.router.bias_E.any():
            raise ValueError(f"{name}: its selection bias is not zero, and stock softmax routers have none")
    # That family's files have no width of heads, but those of qwen2_moe, as which it is written, do.
    heads = {"head_dim": config.head_width} if family == "deepseek" else {}
    config = replace(config, d_head=0) if family == "deepseek" else config
    said = config_to_huggingface(config, router, family, max_positions=max_positions, end_token=end_token) | heads
    dtype = model.embedding.weight.dtype
    return Source(
        where=str(where),
        fingerprint=fingerprint,
        family=family,
        config=said | {"torch_dtype": str(dtype).removeprefix("torch.")},
        shape=shape_of_model(model.config, router),
        origin=tuple(range(model.config.layers)),
        weights={
            disk_name: Lazy(tuple(view.shape), view.contiguous)
            for name, parameter in model.named_parameters()
            for disk_name, view in to_huggingface(name, parameter.detach(), family)
        },
        dtype=dtype,
        companions=_companions(tokenizer),
    )


def check_source(source: Source) -> None:
    """Raises ValueError where a tensor is missing, unknown, too many, or of another shape than in the other layers.

    Stock loaders warn of it, at most. All layers with experts are to have equally many.
    """
    shape = source.shape
    tied = bool(source.config.get("tie_word_embeddings"))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")[: 2 if tied else 3]:
        if name not in source.weights:
            raise ValueError(f"{source.where}: {name} is missing")
    layers: list[dict[Place, str]] = [{} for _ in range(shape.layers)]
    for name, place in places_of(source.weights, source.family, shape.layers).items():
        if place.layer is not None:
            # Its number aside, a layer is to have what others of its kind have.
            layers[place.layer][replace(place, layer=0)] = name
    firsts: dict[str, tuple[int, dict[Place, tuple[int, ...]]]] = {}
    for layer, names in enumerate(layers):
        kind = "experts" if shape.experts[layer] else "dense" if layer in shape.dense else "bare"
        needed = _needed(kind, shape.experts[layer])
        feed = {place for place in names if place.part != "attention"}
        free = {place for place in feed if kind == "experts" and place.part in ("shared", "router_bias")}
        if lacking := sorted(map(str, needed - feed)):
            raise ValueError(f"{source.where}: layer {layer} lacks {lacking[0]}; fetch or make it again")
        if left := sorted(names[place] for place in feed - free - needed):
            raise ValueError(f"{source.where}: {left[0]} is left over: nothing of that layer reads it")
        shapes = {place: source.weights[name].shape for place, name in names.items()}
        for place in feed:
            if place.part in ("router", "router_bias") and shapes[place][0] != shape.experts[layer]:
                raise ValueError(
                    f"{source.where}: {names[place]} is of {shapes[place][0]} experts instead of {shape.experts[layer]}"
                )
        for what, mine in (("attention", shapes.keys() - feed), (kind, feed)):
            found = {place: shapes[place] for place in mine}
            first, like = firsts.setdefault(what, (layer, found))
            if unlike := sorted(
                str(place) for place in found.keys() | like.keys() if found.get(place) != like.get(place)
            ):
                raise ValueError(f"{source.where}: layers {first} and {layer} differ in {unlike[0]}; one is damaged")


def _needed(kind: str, experts: int) -> set[Place]:
    """What a layer's feed-forward network consists of at least."""
    if kind == "bare":
        return set()
    parts = ("gate", "up", "down")
    if kind == "dense":
        return {Place(0, "norm", "norm"), *(Place(0, "dense", part) for part in parts)}
    each = {Place(0, "expert", part, expert) for expert in range(experts) for part in parts}
    return {Place(0, "norm", "norm"), Place(0, "router", "router"), *each}


def _said_by_family(config: ModelConfig, router: RouterConfig) -> tuple[ModelConfig, Family]:
    """`config` with experts in all layers and the family whose tensors it has; layers that differ are said later."""
    moe = config.moe
    if moe is None:
        raise ValueError("model.moe: null has no experts; use `wastenot convert to-hf`")
    plain = replace(config, moe=replace(moe, per_layer=(), dense=(), every=1, first_dense=0))
    dense = [layer for layer in range(config.layers) if config.is_dense(layer)]
    if config.qk_norm == "head":
        return plain, "qwen3_moe"
    if config.qk_norm == "full":
        if dense:
            raise ValueError(f"model.moe: layers {dense} are dense; all of the olmoe family have experts")
        return plain, "olmoe"
    return plain, "deepseek" if moe.shared_experts or dense or router.normalize == "none" else "mixtral"


def _companions(folder: Path) -> tuple[Path, ...]:
    own = {CONFIG, BASE_CONFIG, COMPRESSED, EXPORTED}
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.suffix in _COMPANIONS or path.name.startswith("LICENSE"))
        and path.name not in own
        and not path.name.endswith(".safetensors.index.json")
    )
