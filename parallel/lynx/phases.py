"""The one-layer problem that HEU repeats (METHODS section 2, HEU): which output has its source in which phase.

A policy says of each operator: kept, computed in one of the layer's forward windows, in one of the backward windows of
the layer that comes just before it in the backward (`before`), in one of its own (`own`), on demand, or nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .problem import Assignment, Layer, Source, Stage

Phase = tuple[str, int]
"""(`forward` | `before` | `own` | `stall`, number of the window), or (`early` | `keep` | `demand` | `none`, 0), where
`early` is any layer's forward window."""
KEEP, DEMAND, NONE = ("keep", 0), ("demand", 0), ("none", 0)
Policy = tuple[Phase, ...]
"""Of each operator of a layer."""


@dataclass(frozen=True)
class Slot:
    """One window as a policy sees it."""

    phase: Phase
    room: float
    largest: float
    """Room of the largest window, where it stands for several."""
    serves: np.ndarray
    """Of each operator, whether the window is before its use."""


@dataclass(frozen=True)
class Structure:
    """What distinguishes a layer from others: its operators, and the windows around its backward."""

    layer: Layer
    after: Layer | None
    """The layer after it in the forward, whose backward windows come before its own; None: the stage's last."""


def structures(stage: Stage) -> list[Structure]:
    """Of each layer of a stage."""
    return [Structure(*pair) for pair in zip(stage.layers, (*stage.layers[1:], None), strict=True)]


def forward_slots(stage: Stage, structure: Structure) -> list[Slot]:
    """Forward windows for a layer; none where no earlier micro-batch waits for its backward.

    A layer has its own. The stage's last has those of all layers: whatever is computed for it is there when the
    backward begins, be it from the first forward window or on demand.
    """
    layer = structure.layer
    everything = np.ones(len(layer.operators), dtype=bool)
    if stage.in_flight == 1:
        return []
    if structure.after is None:
        rooms = [window.room for each in stage.layers for window in each.forward]
        return [Slot(("early", 0), sum(rooms), max(rooms, default=0.0), everything)]
    return [Slot(("forward", w), window.room, window.room, everything) for w, window in enumerate(layer.forward)]


def backward_slots(stage: Stage, structure: Structure, turn: int = 0) -> list[Slot]:
    """Windows between a layer's forward pass and its backward's end, in order.

    Between equal layers a window serves the layer's own backward and the next one's in turn, and has room once: then
    it is listed once, the first `turn` as own ones and the others as those before.
    """
    layer, after = structure.layer, structure.after
    everything = np.ones(len(layer.operators), dtype=bool)
    if after is not None:
        kind, windows = "before", after.backward_windows
    else:
        kind, windows = "stall", stage.stalls
    found = [Slot((kind, w), window.room, window.room, everything) for w, window in enumerate(windows)]
    own = [
        Slot(("own", w), window.room, window.room, serves)
        for w, (window, serves) in enumerate(zip(layer.backward_windows, served(layer), strict=True))
    ]
    return found[turn:] + own[:turn] if after == layer else found + own


def served(layer: Layer) -> list[np.ndarray]:
    """Of each backward window of a layer and each of its operators, whether the window is before the operator's use."""
    alone = Stage(layers=(layer,), in_flight=1, budget=0)
    until = np.array(alone.last_window[0], dtype=int)
    return [until > at for at, event in enumerate(alone.events) if event.window is not None]


def expand(stage: Stage, policies: Sequence[Policy]) -> Assignment:
    """The assignment that one policy a layer comes to.

    The stage's last layer has none before it in the backward: what was to be computed there goes to stalls where they
    have room, and is on demand otherwise.
    """
    windows = stage.windows
    early = [at for (layer, backward), each in windows.items() if not backward and layer >= 0 for at in each]
    stalls = windows.get((-1, False), ())
    left = {at: window.room for at in (*early, *stalls) if (window := stage.events[at].window) is not None}
    found: list[tuple[Source, ...]] = []
    for number, policy in enumerate(policies[:-1]):
        where = {
            "forward": windows.get((number, False), ()),
            "before": windows.get((number + 1, True), ()),
            "own": windows.get((number, True), ()),
        }
        found.append(tuple(where[kind][w] if kind in where else _plain(kind) for kind, w in policy))
        for operator, source in zip(stage.layers[number].operators, found[-1], strict=True):
            if isinstance(source, int) and source in left:
                left[source] -= operator.seconds
    last = len(policies) - 1
    where = {"forward": windows.get((last, False), ()), "own": windows.get((last, True), ())}
    where |= {"early": early, "before": stalls, "stall": stalls}
    found.append(_last(stage, policies[-1], where, left))
    return tuple(found)


def _plain(kind: str) -> Source:
    assert kind == "keep" or kind == "demand" or kind == "none"
    return kind


def _last(
    stage: Stage, policy: Policy, where: Mapping[str, Sequence[int]], left: dict[int, float]
) -> tuple[Source, ...]:
    """Sources of the stage's last layer, with seconds still `left` of windows before the backward."""
    layer = stage.layers[-1]
    found: list[Source] = []
    for i, (kind, w) in enumerate(policy):
        inputs = [found[j] for j in layer.inputs[i]]
        first = max((source for source in inputs if isinstance(source, int)), default=-1)
        source: Source
        if kind not in where:
            source = _plain(kind)
        elif "demand" in inputs:
            source = "demand"
        elif kind == "early" or kind == "before":
            source = _roomy(layer.operators[i].seconds, [at for at in where[kind] if at >= first], left)
        else:
            source = where[kind][w]
        if isinstance(source, int) and source in left:
            left[source] -= layer.operators[i].seconds
        found.append(source)
    return tuple(found)


def _roomy(seconds: float, windows: list[int], left: dict[int, float]) -> Source:
    """The first window with room for all, or the one with the most room, or demand where none has any."""
    best = next((at for at in windows if left[at] >= seconds), None)
    if best is None:
        best = max(windows, key=left.__getitem__, default=None)
    return best if best is not None and left[best] > 0.0 else "demand"
