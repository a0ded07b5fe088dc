"""The weights of a model by name and size, and what they sum to: counted from the shape alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from .shape import LayerKind, ModelShape


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Matrices of one size, or vectors (`columns` 1)."""

    name: str
    rows: int
    columns: int = 1
    copies: int = 1
    """As many matrices of this size: the experts of a layer."""
    split: Literal["none", "rows", "columns"] = "none"
    """Which side tensor parallelism cuts."""
    role: Literal["hidden", "vector", "embedding", "expert"] = "hidden"
    """`expert`: cut over expert-parallel ranks, not by tensor parallelism."""

    @property
    def numel(self) -> int:
        return self.rows * self.columns * self.copies

    def local(self, tensor: int, expert: int) -> float:
        """Numbers on one of so many tensor-parallel and expert-parallel ranks, before ZeRO."""
        if self.role == "expert":
            return self.numel / expert
        return self.numel / tensor if self.split != "none" else self.numel


def total(shape: ModelShape) -> int:
    """All parameters. Selection biases of routers are buffers and do not count."""
    counts = {kind: _sum(layer_weights(shape, kind)) for kind in set(shape.kinds)}
    return _sum(outer_weights(shape)) + sum(counts[kind] for kind in shape.kinds)


def active(shape: ModelShape) -> int:
    """Parameters that one token's forward pass uses; the embedding counts whole, as published totals have it."""
    counts = {kind: _sum_active(shape, kind) for kind in set(shape.kinds)}
    return _sum(outer_weights(shape)) + sum(counts[kind] for kind in shape.kinds)


def _sum(weights: tuple[Weight, ...]) -> int:
    return sum(weight.numel for weight in weights)


def _sum_active(shape: ModelShape, kind: LayerKind) -> int:
    used = shape.experts.top_k if shape.experts is not None else 0
    return sum(
        weight.numel // weight.copies * used if weight.role == "expert" else weight.numel
        for weight in layer_weights(shape, kind)
    )


@cache
def layer_weights(shape: ModelShape, kind: LayerKind) -> tuple[Weight, ...]:
    """Of one layer of this kind."""
    return (*_attention(shape), *(_moe(shape) if kind == "moe" else _dense(shape)))


@cache
def first_weights(shape: ModelShape) -> tuple[Weight, ...]:
    """Of what comes before the first layer."""
    found = [Weight(name="embedding", rows=shape.vocab, columns=shape.d_model, split="rows", role="embedding")]
    if shape.positions:
        found.append(Weight(name="positions", rows=shape.positions, columns=shape.d_model, role="embedding"))
    return tuple(found)


@cache
def last_weights(shape: ModelShape) -> tuple[Weight, ...]:
    """Of what comes after the last layer; a tied output layer is the embedding's and not listed."""
    head = Weight(name="head", rows=shape.vocab, columns=shape.d_model, split="rows", role="embedding")
    return (*_norm(shape, "final norm", shape.d_model), *(() if shape.tied else (head,)))


def outer_weights(shape: ModelShape) -> tuple[Weight, ...]:
    """Of all that is no layer."""
    return first_weights(shape) + last_weights(shape)


def _norm(shape: ModelShape, name: str, width: int) -> Iterator[Weight]:
    yield Weight(name=name, rows=width, role="vector")
    if shape.biases:
        yield Weight(name=f"{name} bias", rows=width, role="vector")


def _linear(
    shape: ModelShape, name: str, rows: int, columns: int, split: Literal["none", "rows", "columns"]
) -> Iterator[Weight]:
    yield Weight(name=name, rows=rows, columns=columns, split=split)
    if shape.biases:
        yield Weight(name=f"{name} bias", rows=rows, split="rows" if split == "rows" else "none", role="vector")


def _attention(shape: ModelShape) -> Iterator[Weight]:
    D, latent = shape.d_model, shape.latent
    yield from _norm(shape, "norm 1", D)
    if latent is not None:
        rank, kv_rank = latent.query_rank, latent.kv_rank
        if rank:
            yield from _linear(shape, "query down", rank, D, "none")
            yield from _norm(shape, "query norm", rank)
        yield from _linear(shape, "query", shape.heads * shape.qk_dim, rank or D, "rows")
        yield from _linear(shape, "latent down", kv_rank + latent.rope_dim, D, "none")
        yield from _norm(shape, "latent norm", kv_rank)
        yield from _linear(shape, "key", shape.heads * latent.nope_dim, kv_rank, "rows")
        yield from _linear(shape, "value", shape.heads * latent.value_dim, kv_rank, "rows")
    else:
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        yield from _linear(shape, "query", queries, D, "rows")
        yield from _linear(shape, "key", keys, D, "rows")
        yield from _linear(shape, "value", keys, D, "rows")
        if shape.qk_norm != "none":
            full = shape.qk_norm == "full"
            yield Weight(name="query norm", rows=queries if full else shape.head_dim, role="vector")
            yield Weight(name="key norm", rows=keys if full else shape.head_dim, role="vector")
    yield from _linear(shape, "projection", D, shape.heads * shape.value_dim, "columns")


def _dense(shape: ModelShape) -> Iterator[Weight]:
    yield from _norm(shape, "norm 2", shape.d_model)
    if shape.gated:
        yield from _linear(shape, "gate", shape.d_ff, shape.d_model, "rows")
    yield from _linear(shape, "up", shape.d_ff, shape.d_model, "rows")
    yield from _linear(shape, "down", shape.d_model, shape.d_ff, "columns")


def _moe(shape: ModelShape) -> Iterator[Weight]:
    experts, D = shape.experts, shape.d_model
    assert experts is not None, "kinds has no moe without experts"
    yield from _norm(shape, "norm 2", D)
    yield Weight(name="router", rows=experts.experts, columns=D)
    width, copies = experts.d_expert, experts.experts
    for name, rows, columns in (("gate and up", 2 * width, D), ("down", D, width)):
        yield Weight(name=f"expert {name}", rows=rows, columns=columns, copies=copies, role="expert")
    if experts.shared_width:
        yield Weight(name="shared gate", rows=experts.shared_width, columns=D, split="rows")
        yield Weight(name="shared up", rows=experts.shared_width, columns=D, split="rows")
        yield Weight(name="shared down", rows=D, columns=experts.shared_width, split="columns")
