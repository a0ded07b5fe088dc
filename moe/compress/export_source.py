"""What is exported: a stock folder, what `apply` made of one, or a model of ours, as names and tensors on disk."""

from __future__ import annotations

import json
import re
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
from .export_config import STOCK, base_shape, stock_family
from .plan import Shape

__all__ = ["EXPORTED", "Lazy", "Source", "check_source", "from_decoder", "open_folder", "parts_of", "zeros"]

BASE_CONFIG, COMPRESSED, EXPORTED = "base_config.json", "compressed.json", "exported.json"

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_PLAIN = (".weight", ".bias", ".e_score_correction_bias")
"""How names of tensors end that are no part of a quantized one."""
_NORM = "post_attention_layernorm.weight"
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of the files of tokenizers and of generation_config.json."""


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read, or made, when it is written."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as the tensors that a family's checkpoints have, layers and experts numbered from 0."""

    where: str
    """For messages."""
    family: str
    config: Mapping[str, Any]
    """config.json of the base model."""
    shape: Shape
    origin: tuple[int, ...]
    """Number of each layer in the base model."""
    weights: Mapping[str, Lazy]
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

    Raises ValueError where it is neither, a file is damaged, or it is quantized.
    """
    folder = Path(folder)
    applied = (folder / COMPRESSED).is_file()
    path = folder / (BASE_CONFIG if applied else CONFIG)
    config = _read_object(path)
    try:
        family = stock_family(config)
        shape = base_shape(config, family)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    origin, plans = tuple(range(shape.layers)), ()
    if applied:
        shape, origin, plans = _compressed(folder / COMPRESSED, shape.layers)
    stored = StoredWeights(folder)
    names = [name for name in stored if _is_of_model(name, shape.layers)]
    return Source(
        where=str(folder),
        family=family,
        config=config,
        shape=shape,
        origin=origin,
        weights={name: Lazy(stored.shape(name), partial(stored.__getitem__, name)) for name in names},
        companions=_companions(folder),
        plans=plans,
    )


def from_decoder(
    model: Decoder, router: RouterConfig, where: Path, *, max_positions: int, end_token: int | None, tokenizer: Path
) -> Source:
    """A model of ours in this process, whole, as a checkpoint of the family that can say it.

    max_positions, end_token: see `config_to_huggingface`; tokenizer: folder of the tokenizer's files.
    Raises ValueError where no family can.
    """
    config, family = _said_by_family(model.config, router)
    for name, module in model.named_modules():
        if isinstance(module, MoELayer) and module.router.bias_E.any():
            raise ValueError(f"{name}: its selection bias is not zero, and stock softmax routers have none")
    weights = {
        disk_name: Lazy(tuple(view.shape), view.contiguous)
        for name, parameter in model.named_parameters()
        for disk_name, view in to_huggingface(name, parameter.detach(), family)
    }
    heads = {"head_dim": config.head_width} if family == "deepseek" else {}
    # That family's files have no width of heads, but those of qwen2_moe, as which it is written, do.
    config = replace(config, d_head=0) if family == "deepseek" else config
    said = config_to_huggingface(config, router, family, max_positions=max_positions, end_token=end_token) | heads
    said["torch_dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    layers = range(model.config.layers)
    shape = Shape(
        experts=tuple(model.config.num_experts(layer) for layer in layers),
        top_k=router.top_k,
        dense=tuple(layer for layer in layers if model.config.is_dense(layer)),
    )
    return Source(
        where=str(where),
        family=family,
        config=said,
        shape=shape,
        origin=tuple(layers),
        weights=weights,
        companions=_companions(tokenizer),
    )


def parts_of(source: Source, layer: int) -> dict[str, Lazy]:
    """The tensors of `layer` by their names within it."""
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): lazy for name, lazy in source.weights.items() if name.startswith(prefix)}


def is_feed_forward(part: str, block: str) -> bool:
    """Whether `part`, a name within a layer, is of its feed-forward network or of the norm before it."""
    return part == _NORM or part.startswith(f"{block}.")


def check_source(source: Source) -> None:
    """Raises ValueError where tensors are missing, too many or quantized: stock loaders only warn of them.

    All layers with experts are to have equally many.
    """
    for name in source.weights:
        if not name.endswith(_PLAIN):
            raise ValueError(f"{source.where}: {name} is no plain weight; quantized models cannot be exported yet")
        if name not in _OUTSIDE and not _LAYER.fullmatch(name):
            raise ValueError(f"{source.where}: {name} is no weight of a {source.family} model")
    tied = bool(source.config.get("tie_word_embeddings"))
    if missing := [name for name in _OUTSIDE[: 2 if tied else 3] if name not in source.weights]:
        raise ValueError(f"{source.where}: {missing[0]} is missing")
    block = STOCK[source.family].block
    models: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {}
    for layer, experts in enumerate(source.shape.experts):
        shapes = {part: lazy.shape for part, lazy in parts_of(source, layer).items()}
        feed = {part: shape for part, shape in shapes.items() if is_feed_forward(part, block)}
        kind = "experts" if experts else "a dense network" if layer in source.shape.dense else "no network"
        expected = _expected(kind, experts, feed, source.family)
        _same(source, layer, feed, expected, f"a layer with {kind}")
        for what, found in ((kind, feed), ("attention", {part: shapes[part] for part in shapes.keys() - feed.keys()})):
            first, like = models.setdefault(what, (layer, found))
            _same(source, layer, found, like, f"layer {first}")


def _expected(kind: str, experts: int, feed: dict[str, tuple[int, ...]], family: str) -> dict[str, tuple[int, ...]]:
    """`feed` with what must be there of a layer's feed-forward network, whatever else there is."""
    stock = STOCK[family]
    if kind == "no network":
        return {}
    if kind == "a dense network":
        names = [f"{stock.block}.{part}_proj.weight" for part in ("gate", "up", "down")]
        return {name: feed.get(name, ()) for name in (_NORM, *names)}
    others = {part: shape for part, shape in feed.items() if not part.startswith(f"{stock.block}.experts.")}
    for part in others.keys() & {f"{stock.block}.gate.weight", f"{stock.block}.gate.e_score_correction_bias"}:
        others[part] = (experts, *others[part][1:])
    named = [f"{stock.block}.experts.{expert}.{part}.weight" for expert in range(experts) for part in stock.projections]
    return others | {name: feed.get(name, ()) for name in (_NORM, f"{stock.block}.gate.weight", *named) if name}


def _same(
    source: Source, layer: int, found: Mapping[str, tuple[int, ...]], like: Mapping[str, tuple[int, ...]], what: str
) -> None:
    for part in sorted(found.keys() | like.keys()):
        if found.get(part) != like.get(part):
            here, there = ((list(of[part]) or "there") if part in of else "missing" for of in (found, like))
            raise ValueError(
                f"{source.where}: model.layers.{layer}.{part} is {here}, not {there} as of {what}; a stock loader "
                f"would only warn. Is the checkpoint whole?"
            )


def _said_by_family(config: ModelConfig, router: RouterConfig) -> tuple[ModelConfig, Family]:
    """`config` with experts in all layers and the family whose tensors it has; layers that differ are said later."""
    moe = config.moe
    if moe is None:
        raise ValueError("model.moe: null has no experts; use `wastenot convert to-hf`")
    plain = replace(config, moe=replace(moe, per_layer=(), dense=(), every=1, first_dense=0))
    if config.qk_norm == "head":
        return plain, "qwen3_moe"
    if config.qk_norm == "full":
        return plain, "olmoe"
    has_dense = any(config.is_dense(layer) for layer in range(config.layers))
    if moe.shared_experts or has_dense or router.normalize == "none":
        return plain, "deepseek"
    return plain, "mixtral"


def _compressed(path: Path, layers: int) -> tuple[Shape, tuple[int, ...], tuple[str, ...]]:
    """(shape, origin, plans) of `path`, for a base model of `layers`."""
    raw = _read_object(path)
    try:
        if raw["version"] != 1:
            raise ValueError(f"version: {raw['version']} is unknown; this version of wastenot reads 1")
        given = raw["shape"]
        shape = Shape(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
        origin = tuple(int(layer) for layer in raw["origin"])
        plans = tuple(map(str, raw["plans"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if raw.get("quantize"):
        raise ValueError(f"{path}: quantize: quantized models cannot be exported yet")
    if len(origin) != shape.layers or sorted(set(origin)) != list(origin) or not set(origin) <= set(range(layers)):
        raise ValueError(f"{path}: origin: {list(origin)} does not name {shape.layers} of {layers} layers in order")
    return shape, origin, plans


def _is_of_model(name: str, layers: int) -> bool:
    """Whether `name` is a weight of the model: not of layers behind the last that predict further tokens."""
    match = _LAYER.fullmatch(name)
    # Old checkpoints keep the frequencies of the rotary embedding, which follow from its theta.
    return not name.endswith(".rotary_emb.inv_freq") and (match is None or int(match[1]) < layers)


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


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give the folder of a checkpoint") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value
