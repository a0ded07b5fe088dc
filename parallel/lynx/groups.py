"""Layers of a stage by structure, each with the front of policies that its layers may take."""

from __future__ import annotations

from dataclasses import dataclass

from .front import Priced, front
from .phases import Structure, structures
from .problem import Stage

Fronts = dict[tuple[Structure, tuple[float, ...]], tuple[Priced, ...]]
"""Known ones, by structure and seconds reserved."""


@dataclass(frozen=True)
class Group:
    """Layers of one structure, from the first to the last, and the policies they may take."""

    numbers: tuple[int, ...]
    front: tuple[Priced, ...]
    has_ends: bool
    """Whether the last of several equal layers is the stage's last."""


def groups(stage: Stage, fronts: Fronts, *, last_apart: bool) -> list[Group]:
    """Layers by structure, with the front of each. `last_apart`: the stage's last layer is a structure of its own."""
    numbers: dict[Structure, list[int]] = {}
    for number, structure in enumerate(structures(stage)):
        numbers.setdefault(structure, []).append(number)
    last = structures(stage)[-1]
    alike = Structure(last.layer, last.layer)
    if not last_apart and alike in numbers:
        numbers[alike] += numbers.pop(last)
    found: dict[Structure, Group] = {}
    # From the stage's end, so that what a layer itself may use of its windows is known to the layer before it.
    for structure, whose in sorted(numbers.items(), key=lambda item: -item[1][-1]):
        neighbour = next((g for s, g in found.items() if s.layer == structure.after), None)
        reserved = (
            () if structure.after in (None, structure.layer) or neighbour is None else _own_load(stage, neighbour)
        )
        has_ends = structure == alike and len(stage.layers) - 1 in whose
        key = (structure, tuple(reserved))
        if key not in fronts:
            fronts[key] = tuple(front(stage, structure, reserved))
        found[structure] = Group(tuple(whose), fronts[key], has_ends)
    return list(found.values())


def _own_load(stage: Stage, group: Group) -> list[float]:
    """Seconds of each of its own backward windows that a layer with the fewest bytes uses."""
    layer = stage.layers[group.numbers[0]]
    load = [0.0] * len(layer.backward_windows)
    for operator, (kind, w) in zip(layer.operators, group.front[0].policy, strict=True):
        if kind == "own":
            load[w] += operator.seconds
    return load
