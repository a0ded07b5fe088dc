"""The attention half of a layer: grouped-query or latent, fused (flash) or with its softmax kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .place import Place
from .problem import Window
from .shape import Latent
from .steps import Exchange, Step


class _Heads(NamedTuple):
    """Names of the steps whose outputs are queries and keys, and values."""

    queries_keys: str
    values: str


def attention_steps(at: Place) -> Iterator[Step | Exchange]:
    """From the layer's `input` to `residual 1`."""
    shape, layout = at.shape, at.layout
    yield Step(name="input", bytes=at.local * shape.d_model * layout.residual_bytes, kind="input")
    yield at.norm("norm 1", "input", at.local, shape.d_model, layout.residual_bytes)
    enter, again = at.enter("attention", "norm 1")
    yield enter
    if shape.latent is not None:
        made, heads = _latent(at, shape.latent, enter.name, again)
    else:
        made, heads = _grouped(at, enter.name, again)
    yield from made
    yield from _flash(at, heads) if layout.flash else _with_softmax(at, heads)
    yield at.linear("projection", "attention", at.T, shape.heads // layout.tensor * shape.value_dim, shape.d_model)
    leave = at.leave("attention", "projection")
    yield leave
    mask = "mask 1" if shape.dropout else ""
    if mask:
        yield at.mask(mask, at.local * shape.d_model)
    yield at.residual("residual 1", "input", leave.name, mask)


def _local_kv_heads(at: Place) -> int:
    """Where there are more ranks than key/value heads, ranks share one."""
    return max(1, at.shape.kv_heads // at.layout.tensor)


def _grouped(at: Place, source: str, again: Window | None) -> tuple[list[Step], _Heads]:
    shape = at.shape
    heads, kv_heads = shape.heads // at.layout.tensor, _local_kv_heads(at)
    both = (heads + kv_heads) * shape.head_dim
    steps = [at.linear("query and key", source, at.T, shape.d_model, both, reads="norm 1")]
    last = "query and key"
    if shape.qk_norm != "none":
        steps.append(at.norm("query and key norm", last, at.T, both, at.width))
        last = "query and key norm"
    if shape.rotary:
        size = at.T * both * at.width
        seconds = at.time.memory(2 * size)
        steps.append(Step(name="rotary", seconds=seconds, bytes=size, inputs=(last,), backward=seconds))
        last = "rotary"
    # The backward meets it first, and gathers again for all projections.
    steps.append(
        at.linear("value", source, at.T, shape.d_model, kv_heads * shape.head_dim, reads="norm 1", again=again)
    )
    return steps, _Heads(last, "value")


def _latent(at: Place, latent: Latent, source: str, again: Window | None) -> tuple[list[Step], _Heads]:
    """Down-projections are not cut: each tensor-parallel rank does them for all tokens."""
    shape, T = at.shape, at.T
    heads = shape.heads // at.layout.tensor
    steps, queries = [], heads * shape.qk_dim
    if latent.query_rank:
        steps.append(at.linear("query down", source, T, shape.d_model, latent.query_rank, reads="norm 1"))
        steps.append(at.norm("query norm", "query down", T, latent.query_rank, at.width))
        steps.append(at.linear("query", "query norm", T, latent.query_rank, queries))
    else:
        steps.append(at.linear("query", source, T, shape.d_model, queries, reads="norm 1"))
    down = latent.kv_rank + latent.rope_dim
    steps.append(at.linear("latent down", source, T, shape.d_model, down, reads="norm 1", again=again))
    steps.append(at.norm("latent norm", "latent down", T, latent.kv_rank, at.width))
    steps.append(at.linear("key", "latent norm", T, latent.kv_rank, heads * latent.nope_dim))
    size = 2 * T * queries * at.width
    seconds = at.time.memory(2 * size)
    inputs = ("query", "key", "latent down")
    steps.append(Step(name="rotary", seconds=seconds, bytes=size, inputs=inputs, backward=seconds))
    steps.append(at.linear("value", "latent norm", T, latent.kv_rank, heads * latent.value_dim))
    return steps, _Heads("rotary", "value")


def _products(at: Place) -> float:
    """FLOPs of both matrix products of causal attention: half of all pairs of tokens."""
    shape, layout = at.shape, at.layout
    heads = shape.heads // layout.tensor
    return layout.micro_batch * heads * layout.seq_len**2 * (shape.qk_dim + shape.value_dim)


def _flash(at: Place, heads: _Heads) -> Iterator[Step]:
    """Keeps its output and the log-sum-exp of each row; the backward computes the scores again."""
    shape, T = at.shape, at.T
    local, kv_heads = shape.heads // at.layout.tensor, _local_kv_heads(at)
    output = T * local * shape.value_dim * at.width
    moved = T * at.width * (local + kv_heads) * (shape.qk_dim + shape.value_dim)
    flops = _products(at)
    yield Step(
        name="attention",
        seconds=at.time.attention(flops, moved),
        bytes=output + T * local * 4,
        inputs=heads,
        reads=(*heads, "attention"),
        # Five matrix products instead of two.
        backward=at.time.attention(2.5 * flops, 2 * moved, backward=True),
        flops=flops,
    )


def _with_softmax(at: Place, heads: _Heads) -> Iterator[Step]:
    """Scores are in one piece, and the whole square is computed."""
    shape, layout = at.shape, at.layout
    local, s, b = shape.heads // layout.tensor, layout.seq_len, layout.micro_batch
    numbers = b * local * s * s
    square = numbers * at.width
    multiply = at.time.matmul(b * local * s, s, shape.qk_dim, at.width)
    yield Step(
        name="softmax",
        seconds=multiply + at.time.memory(3 * square),
        bytes=square,
        inputs=(heads.queries_keys,),
        reads=(heads.queries_keys, "softmax"),
        backward=2 * multiply + at.time.memory(3 * square),
        flops=2 * numbers * shape.qk_dim,
    )
    weighing = "softmax"
    if shape.dropout:
        yield at.mask("attention mask", numbers)
        weighing = "attention dropout"
        seconds = at.time.memory(2 * square + numbers)
        yield Step(
            name=weighing,
            seconds=seconds,
            bytes=square,
            inputs=("softmax", "attention mask"),
            reads=("attention mask",),
            backward=seconds,
        )
    multiply = at.time.matmul(b * local * s, shape.value_dim, s, at.width)
    yield Step(
        name="attention",
        seconds=multiply,
        bytes=at.T * local * shape.value_dim * at.width,
        inputs=(weighing, heads.values),
        reads=(weighing, heads.values),
        backward=2 * multiply,
        flops=2 * numbers * shape.value_dim,
    )
