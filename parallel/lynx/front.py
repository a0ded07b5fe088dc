"""The one-layer problem along its memory-time Pareto front, without a MILP (METHODS section 2, HEU and HEU-MIX).

First choices with all windows of a pass as one (`labels.py`), then their windows one by one (`packing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .evaluate import evaluate
from .labels import BACKWARD, FORWARD, labels
from .labels import KEEP as KEPT
from .labels import NONE as NOWHERE
from .packing import Packer
from .phases import DEMAND, KEEP, NONE, Phase, Policy, Slot, Structure, backward_slots, expand, forward_slots
from .problem import Stage

_MOST_TURNED = 10
"""Policies that are tried in later windows too."""


@dataclass(frozen=True)
class Priced:
    """A policy and what one layer of it takes."""

    policy: Policy
    bytes: int
    """That every layer adds: kept of all micro-batches in flight, and recomputed in forward windows."""
    transient: int
    """That the layer now in its backward needs on top."""
    seconds: float
    """Exposed, between equal neighbours."""
    ends: float
    """Exposed on top where a stage of such layers begins and ends."""


def front(stage: Stage, structure: Structure, reserved: Sequence[float] = ()) -> list[Priced]:
    """Policies of one layer of which none is beaten in bytes, transient bytes and seconds at once.

    `reserved`: seconds of each backward window of the layer after it that are taken.
    """
    layer = structure.layer
    forward = forward_slots(stage, structure)
    taken = {("before", w): seconds for w, seconds in enumerate(reserved)}
    backward = [
        replace(slot, room=max(0.0, slot.room - taken.get(slot.phase, 0.0)))
        for slot in backward_slots(stage, structure)
    ]
    slots = [*forward, *backward]
    small, alone = _small(stage, structure), Stage(layers=(layer,), in_flight=1, budget=0)
    found: dict[Policy, Priced] = {}
    choices: dict[Policy, np.ndarray] = {}
    packers: dict[object, Packer] = {}

    def add(choice: np.ndarray, early: Sequence[Slot], late: Sequence[Slot]) -> None:
        policy = [KEEP if c == KEPT else NONE if c == NOWHERE else DEMAND for c in choice.tolist()]
        for what, where in ((FORWARD, early), (BACKWARD, late)):
            chosen = tuple(np.flatnonzero(choice == what).tolist())
            packer = packers.setdefault(tuple(slot.phase for slot in where), Packer(layer))
            for i, phase in packer.pack(chosen, where, must=what == FORWARD).items():
                policy[i] = phase
        settled = _settled(alone, structure, policy)
        if settled not in found:
            found[settled] = _priced(small, structure, slots, settled)
            choices[settled] = choice

    kept = [KEPT if layer.is_needed[i] or o.kind == "input" else NOWHERE for i, o in enumerate(layer.operators)]
    add(np.array(kept), forward, backward)
    # The last layer's forward windows cost time in memory alone, which labels do not see: so with and without.
    for early in [forward, []] if structure.after is None and forward else [forward]:
        for choice in labels(stage, structure, early, backward):
            add(choice, early, backward)
    if structure.after == layer:
        # In later windows outputs are there for less time.
        best = _spread(list(found.values()))
        for turn in range(1, len(backward) + 1):
            for each in best:
                add(choices[each.policy], forward, backward_slots(stage, structure, turn))
    return _unbeaten(list(found.values()))


def _spread(found: list[Priced]) -> list[Priced]:
    """Some of those that none beats in bytes and seconds."""
    front: list[Priced] = []
    for each in sorted(found, key=lambda p: (p.bytes, p.seconds, p.transient)):
        if not front or each.seconds < front[-1].seconds:
            front.append(each)
    places = np.linspace(0, len(front) - 1, min(_MOST_TURNED, len(front))).round().astype(int)
    return [front[place] for place in places]


def _settled(alone: Stage, structure: Structure, policy: list[Phase]) -> Policy:
    """The same with own windows wherever they are early enough, and on demand what waits for something on demand.

    Between equal layers a window is the own one or the one before alike; the own one needs bytes for less time.
    """
    layer = structure.layer
    windows = alone.windows.get((0, True), ())
    is_alike = structure.after == layer
    found = list(policy)
    while True:
        # Of each output, the event before which its window must be.
        until = list(alone.last_window[0])
        for i in reversed(range(len(found))):
            kind, w = found[i]
            readers = [c for c in layer.readers[i] if found[c] not in (KEEP, NONE)]
            until[i] = min([until[i], *(until[c] for c in readers if found[c] == DEMAND)])
            early = [
                c
                for c in readers
                if found[c][0] in ("before", "forward", "early", "stall") or (found[c][0] == "own" and found[c][1] < w)
            ]
            if kind == "before" and is_alike and windows[w] < until[i] and not early:
                found[i] = ("own", w)
            elif kind == "own" and windows[w] > until[i]:
                found[i] = DEMAND
        waits = [
            i
            for i, (kind, _) in enumerate(found)
            if kind not in ("keep", "none", "demand") and any(found[j] == DEMAND for j in layer.inputs[i])
        ]
        if not waits:
            return tuple(found)
        for i in waits:
            found[i] = DEMAND


def _small(stage: Stage, structure: Structure) -> Stage:
    """A stage of the layer and the one after it."""
    layers = (structure.layer,) if structure.after is None else (structure.layer, structure.after)
    return replace(stage, layers=layers, static=0)


def _priced(small: Stage, structure: Structure, slots: Sequence[Slot], policy: Policy) -> Priced:
    """What a policy takes; transient bytes are measured on the small stage."""
    layer = structure.layer
    early = sum(o.bytes for o, (kind, _) in zip(layer.operators, policy, strict=True) if kind == "forward")
    load = dict.fromkeys((slot.phase for slot in slots), 0.0)
    exposed = 0.0
    for operator, (kind, w) in zip(layer.operators, policy, strict=True):
        if kind == "demand":
            exposed += operator.seconds
        elif kind not in ("keep", "none"):
            # Between equal layers, own windows and those before are one.
            load["before" if kind == "own" and structure.after == layer else kind, w] += operator.seconds
    exposed += sum(max(0.0, load[slot.phase] - slot.room) for slot in slots)
    policies = [policy]
    if structure.after == layer:
        policies.append(policy)
    elif structure.after is not None:
        policies.append((KEEP,) * len(structure.after.operators))
    outcome = evaluate(small, expand(small, policies))
    kept = sum(o.bytes for o, phase in zip(layer.operators, policy, strict=True) if phase == KEEP)
    alike = 2 if structure.after == layer else 1
    return Priced(
        policy=policy,
        bytes=small.in_flight * kept + early,
        transient=outcome.peak - small.in_flight * outcome.kept - alike * early,
        seconds=exposed,
        ends=outcome.exposed - alike * exposed,
    )


def _unbeaten(found: list[Priced]) -> list[Priced]:
    kept: list[Priced] = []
    for each in sorted(found, key=lambda p: (p.bytes, p.seconds, p.transient)):
        if not any(p.seconds <= each.seconds and p.transient <= each.transient for p in kept):
            kept.append(each)
    return kept
