"""From what a run measured of its own layers to the stage that a solver plans, and from its answer to names.

A run that recomputes everything on demand for a few steps knows of each operator how long computing it again takes and
how many bytes go with it, and of each window how long it lasts: better than any model of costs. Dependencies, and what
the backward reads, stay the cost model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .problem import Assignment, Layer, Operator, Stage, Window

FIXED = frozenset({"router"})
"""Operators that a run never computes again: the forward's decision stands."""
SHARED = frozenset({"query and key", "query and key norm", "value", "up", "shared up"})
"""Those that no run computes again where tensor ranks share a layer: their inputs came from other ranks."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Layers of one kind on one rank, means over layers and micro-batches."""

    seconds: Mapping[str, float]
    """Of computing an operator again, where anything read it."""
    bytes: Mapping[str, int]
    """That are freed where an operator is not kept; of every one that can be dropped."""
    windows: Mapping[str, float]
    """Seconds, by name."""


def droppable(layer: Layer, tensor: int) -> tuple[str, ...]:
    """Operators of a layer, which `tensor` ranks share, that a run can compute again."""
    fixed = FIXED | SHARED if tensor > 1 else FIXED
    return tuple(each.name for each in layer.operators if each.kind == "compute" and each.name not in fixed)


def with_measured(layer: Layer, measured: Measured) -> Layer:
    """`layer` with measured seconds and bytes; what was never dropped is always kept."""

    def operator(each: Operator) -> Operator:
        if each.kind != "compute":
            return each
        if each.name not in measured.bytes:
            return replace(each, kind="input")
        seconds = measured.seconds.get(each.name, each.seconds)
        return replace(each, seconds=seconds, bytes=measured.bytes[each.name])

    def window(each: Window) -> Window:
        return replace(each, seconds=measured.windows.get(each.name, 0.0))

    return replace(
        layer,
        operators=tuple(operator(each) for each in layer.operators),
        forward=tuple(window(each) for each in layer.forward),
        backward=tuple(window(each) if isinstance(each, Window) else each for each in layer.backward),
    )


@dataclass(frozen=True, kw_only=True)
class Named:
    """An assignment by the names that a run calls things: `{layer}.{operator}` and `{layer}.{window}`."""

    dropped: tuple[str, ...]
    windows: Mapping[str, tuple[str, ...]]
    """Of each window, what is computed again there, in order."""


def by_name(stage: Stage, assignment: Assignment, numbers: Sequence[int]) -> Named:
    """`assignment` of `stage`, whose layers have these `numbers` in the model; the same sources in other words."""
    dropped: list[str] = []
    windows: dict[str, list[str]] = {}
    # Of what shares a window, the layer whose backward comes first goes first.
    for place in reversed(range(len(stage.layers))):
        for operator, source in zip(stage.layers[place].operators, assignment[place], strict=True):
            if source == "keep" or operator.kind != "compute":
                continue
            name = f"{numbers[place]}.{operator.name}"
            dropped.append(name)
            if isinstance(source, int):
                event = stage.events[source]
                windows.setdefault(f"{numbers[event.layer]}.{event.what.name}", []).append(name)
    return Named(dropped=tuple(dropped), windows={window: tuple(names) for window, names in windows.items()})
