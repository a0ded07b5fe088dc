"""The feed-forward half of a layer: dense, or routed to experts on other ranks and back."""

from __future__ import annotations

from collections.abc import Iterator

from .cluster import outermost, reach
from .place import Place
from .routing_skew import Load, exchange_seconds
from .shape import Experts
from .steps import Exchange, Step
from .traffic import all_to_all_bytes, all_to_all_seconds

_ROUTE_BYTES = 28
"""Kept of each route: expert, place among the rows, and token as int64, and the weight in fp32."""


def dense_steps(at: Place) -> Iterator[Step | Exchange]:
    """From `residual 1` to `residual 2`."""
    shape, layout = at.shape, at.layout
    yield at.norm("norm 2", "residual 1", at.local, shape.d_model, layout.residual_bytes)
    enter, again = at.enter("feed-forward", "norm 2")
    yield enter
    hidden = shape.d_ff // layout.tensor
    yield at.linear(
        "up", enter.name, at.T, shape.d_model, hidden * (2 if shape.gated else 1), reads="norm 2", again=again
    )
    yield _activation(at, "activation", "up", at.T, hidden, plain=layout.eager)
    yield at.linear("down", "activation", at.T, hidden, shape.d_model)
    leave = at.leave("feed-forward", "down")
    yield leave
    mask = "mask 2" if shape.dropout else ""
    if mask:
        yield at.mask(mask, at.local * shape.d_model)
    yield at.residual("residual 2", "residual 1", leave.name, mask)


def moe_steps(at: Place, load: Load) -> Iterator[Step | Exchange]:
    """From `residual 1` to `residual 2`, on the rank that receives most rows.

    The gradient of the routing weights is formed on the expert's rank, from what the activation gave and its gradient;
    what combine brings back is read by no backward (METHODS L2). An eager layer forms it where the tokens are, from
    what combine brought.
    """
    shape, experts = at.shape, at.shape.experts
    assert experts is not None, "a layer of kind moe has experts"
    D, T, width = shape.d_model, at.local, at.width
    routes = T * experts.top_k
    yield at.norm("norm 2", "residual 1", T, D, at.layout.residual_bytes)
    # In fp32, as its input is for it (METHODS R1).
    matmul = at.time.matmul(T, experts.experts, D, 4, dtype="fp32")
    scores = T * experts.experts * 4
    yield Step(
        name="router",
        seconds=matmul + at.time.memory(3 * scores),
        bytes=scores,
        inputs=("norm 2",),
        reads=("norm 2", "router"),
        backward=matmul + at.time.memory(3 * scores),
        weights=matmul,
        flops=2 * T * D * experts.experts,
    )
    # Always kept: recomputation reuses the forward's decision.
    kept = routes * _ROUTE_BYTES + 8 * experts.experts
    yield Step(name="routing", seconds=at.time.memory(scores + 2 * kept), bytes=kept, inputs=("router",), kind="input")
    rows = load.num_sent * D * width
    tokens = T * D * width
    yield Step(
        name="permute",
        seconds=at.time.memory(tokens + rows),
        bytes=rows,
        inputs=("norm 2", "routing"),
        reads=("routing",),
        backward=at.time.memory(tokens + rows),
    )
    yield from _routed(at, experts, load)
    outputs = "combine" if at.layout.expert > 1 else "expert down"
    yield Step(
        name="weighted sum",
        seconds=at.time.memory(tokens + rows),
        bytes=tokens,
        inputs=("combine", "routing"),
        reads=("routing", outputs) if at.layout.eager else ("routing",),
        backward=at.time.memory(tokens + rows),
    )
    branch = "weighted sum"
    if experts.shared_width:
        leave = at.leave("shared", "shared down")
        yield from _shared(at, experts)
        yield leave
        seconds = at.time.memory(3 * tokens)
        yield Step(name="both", seconds=seconds, bytes=tokens, inputs=("weighted sum", leave.name))
        branch = "both"
    yield at.residual("residual 2", "residual 1", branch, "")


def _activation(at: Place, name: str, source: str, rows: int, hidden: int, *, plain: bool = False) -> Step:
    """SiLU of one half times the other, or GELU; `plain` SiLU is an output too."""
    output = rows * hidden * at.width
    read = output * (2 if at.shape.gated else 1)
    return Step(
        name=name,
        seconds=at.time.memory(read + output),
        bytes=output * (2 if plain and at.shape.gated else 1),
        inputs=(source,),
        reads=(source,),
        backward=at.time.memory(2 * read + output),
    )


def _routed(at: Place, experts: Experts, load: Load) -> Iterator[Step | Exchange]:
    """From `permute` to `combine`: there, through the experts, and back."""
    layout, D, F, width = at.layout, at.shape.d_model, experts.d_expert, at.width
    own, rows = experts.experts // layout.expert, load.fullest
    received = rows * D * width
    seconds = exchange_seconds(at.cluster, layout, load, D * width)
    rho = outermost(at.cluster, layout.expert_group).slowdown
    there = Exchange(
        name="dispatch",
        forward=seconds + _counts_seconds(at, experts),
        backward=seconds,
        bytes=received,
        inputs=("permute",),
        speed=rho,
        axis="expert",
    )
    yield there
    sorting = at.time.memory(2 * received) if own > 1 and layout.expert > 1 else 0.0
    source = "dispatch" if there.forward else "permute"
    if sorting:
        # Rows come by source rank, and leave by it.
        yield Step(name="sort rows", seconds=sorting, bytes=received, inputs=(source, "routing"), backward=sorting)
        source = "sort rows"
    up = at.time.grouped(rows, 2 * F, D, own, width)
    yield Step(
        name="expert up",
        seconds=up,
        bytes=rows * 2 * F * width,
        inputs=(source,),
        reads=(source,),
        backward=up,
        weights=up,
        flops=2 * rows * 2 * F * D,
        gradient_bytes=at.formed(own * 2 * F * D),
    )
    yield _activation(at, "expert activation", "expert up", rows, F)
    down = at.time.grouped(rows, D, F, own, width)
    yield Step(
        name="expert down",
        seconds=down,
        bytes=received,
        inputs=("expert activation",),
        reads=("expert activation",),
        backward=down,
        weights=down,
        flops=2 * rows * F * D,
        gradient_bytes=at.formed(own * F * D),
    )
    source = "expert down"
    if sorting:
        yield Step(name="unsort rows", seconds=sorting, bytes=received, inputs=(source, "routing"), backward=sorting)
        source = "unsort rows"
    yield Exchange(
        name="combine",
        forward=seconds,
        backward=seconds,
        bytes=load.num_sent * D * width,
        inputs=(source,),
        speed=rho,
        axis="expert",
    )


def _counts_seconds(at: Place, experts: Experts) -> float:
    """Of telling each rank how many rows will come; slots that are always sent need no telling."""
    if at.layout.padded or at.layout.expert == 1:
        return 0.0
    group = at.layout.expert_group
    volumes = all_to_all_bytes(reach(at.cluster, group), 8 * experts.experts)
    return all_to_all_seconds(at.cluster, group, volumes)


def _shared(at: Place, experts: Experts) -> Iterator[Step | Exchange]:
    """The experts that every token uses, cut by tensor parallelism; on their own, under no exchange."""
    D, hidden = at.shape.d_model, experts.shared_width // at.layout.tensor
    enter, again = at.enter("shared", "norm 2")
    yield enter
    yield at.linear("shared up", enter.name, at.T, D, 2 * hidden, reads="norm 2", again=again)
    yield _activation(at, "shared activation", "shared up", at.T, hidden, plain=at.layout.eager)
    yield at.linear("shared down", "shared activation", at.T, hidden, D)
