"""Which outputs of a layer have their source where, with all windows of a pass as one: the choices worth a look.

Labels grow from the last operator to the first. Of those that leave the same to be done, only those are kept that no
other beats in bytes and seconds. What is left in the end is the memory-time front, and more: the front that there would
be if windows hid less, for windows one by one hide less than all as one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .phases import Slot, Structure
from .problem import Layer, Stage

# What an operator whose reader does so must at least be: the higher, the earlier it is computed.
NONE, REPLAY, BACKWARD, FORWARD, KEEP = range(5)
"""Sources: nowhere, on demand with or after a replayed collective, in the backward, in forward windows, kept."""
_MOST_LABELS = 800
"""More are thinned out, by comparing seconds in steps."""
_SHARES = ((1.0, 1.0), (0.7, 0.7), (0.4, 0.4), (0.0, 0.0))
"""Of the forward's and the backward's windows: what they might hide."""


def labels(stage: Stage, structure: Structure, forward: Sequence[Slot], backward: Sequence[Slot]) -> np.ndarray:
    """Choices of all operators, [label, operator], that few others beat."""
    layer, size = structure.layer, len(structure.layer.operators)
    early_room, late_room = sum(slot.room for slot in forward), sum(slot.room for slot in backward)
    # What is larger than any window is exposed in part wherever it is.
    early_most = max((slot.largest for slot in forward), default=0.0)
    late_most = [max((slot.room for slot in backward if slot.serves[i]), default=0.0) for i in range(size)]
    # What the backward has recomputed is there for one layer of all.
    weight = np.zeros(5)
    share = 1 / len(stage.layers)
    weight[[KEEP, FORWARD, BACKWARD, REPLAY]] = stage.in_flight, 1.0 if structure.after else share, share, share
    mixing = np.random.default_rng(0).integers(1, 1 << 62, size=size)
    replays = _waits_for_collective(layer) if stage.replay else (False,) * size

    choice = np.zeros((1, size), dtype=np.int8)
    least = np.zeros((1, size), dtype=np.int8)
    # Bytes; seconds under forward windows, under backward windows, and exposed.
    costs = np.zeros((4, 1))
    for i in reversed(range(size)):
        operator = layer.operators[i]
        if operator.kind == "input" or operator.bytes == 0:
            choice[:, i] = KEEP
            continue
        wanted = (least[:, i] > NONE) | layer.is_needed[i]
        options = [(NONE, ~wanted), (KEEP, wanted)]
        if operator.kind == "compute":
            options += [(FORWARD, wanted & (costs[1] < early_room)), (BACKWARD, wanted & (least[:, i] <= BACKWARD))]
        if replays[i]:
            options += [(REPLAY, wanted & (least[:, i] <= REPLAY))]
        rows = np.concatenate([np.flatnonzero(may) for _, may in options])
        what = np.repeat([value for value, _ in options], [may.sum() for _, may in options]).astype(np.int8)
        choice, least, costs = choice[rows], least[rows], costs[:, rows]
        choice[:, i] = what
        for j in layer.inputs[i]:
            least[:, j] = np.maximum(least[:, j], np.where(what == KEEP, NONE, what))
        early, late = min(operator.seconds, early_most), min(operator.seconds, late_most[i])
        costs += [
            operator.bytes * weight[what],
            early * (what == FORWARD),
            late * (what == BACKWARD),
            np.array([0.0, operator.seconds, operator.seconds - late, operator.seconds - early, 0.0])[what],
        ]
        rows = _survivors(least[:, :i].astype(np.int64) @ mixing[:i], costs)
        choice, least, costs = choice[rows], least[rows], costs[:, rows]
    memory, early, late, exposed = costs
    found = set()
    for early_share, late_share in _SHARES:
        over = np.maximum(0.0, early - early_share * early_room) + np.maximum(0.0, late - late_share * late_room)
        order = np.lexsort((exposed + over, memory))
        fewest = np.minimum.accumulate((exposed + over)[order])
        found |= set(order[np.concatenate([[True], fewest[1:] < fewest[:-1]])].tolist())
    return choice[sorted(found)]


def _waits_for_collective(layer: Layer) -> tuple[bool, ...]:
    """Of each operator, whether it is a collective or needs the output of one."""
    found: list[bool] = []
    for operator, inputs in zip(layer.operators, layer.inputs, strict=True):
        found.append(operator.kind == "collective" or any(found[j] for j in inputs))
    return tuple(found)


def _survivors(key: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Rows that none of the same key beats: bytes against late seconds, the other seconds being the same."""
    steps = np.maximum(costs[1:].max(axis=1, keepdims=True), 1e-300) / (1 << 40)
    while True:
        early, late, exposed = (costs[1:] / steps).astype(np.int64)
        order = np.lexsort((costs[0], late, early, exposed, key))
        group = np.stack([key, early, exposed])[:, order]
        number = np.cumsum(np.concatenate([[False], np.any(group[:, 1:] != group[:, :-1], axis=0)]))
        # Fewest bytes so far within each group; groups are set apart by more than any bytes.
        apart = costs[0][order] / (costs[0].max() + 1.0) - 2.0 * number
        fewest = np.minimum.accumulate(apart)
        rows = order[np.concatenate([[True], fewest[1:] < fewest[:-1]])]
        if len(rows) <= _MOST_LABELS:
            return rows
        steps = np.maximum(2 * steps, costs[1:].max(axis=1, keepdims=True) / 256)
