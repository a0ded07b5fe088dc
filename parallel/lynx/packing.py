"""Windows one by one, exactly, for a set of operators.

What is computed by the end of a window is a set closed under inputs, so that a shortest path through such sets, window
by window, is the best packing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .phases import DEMAND, Phase, Slot
from .problem import Layer

_MOST_SETS = 256
"""Closed sets of operators, beyond which packing keeps to the operators' order."""


class Packer:
    """Gives each of a set of operators a window; remembers what it has done."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.seconds = np.array([o.seconds for o in layer.operators])
        self.done: dict[tuple[int, ...], dict[int, Phase]] = {}

    def pack(self, chosen: tuple[int, ...], slots: Sequence[Slot], *, must: bool) -> dict[int, Phase]:
        """Phase by operator, with the fewest seconds exposed; `must`: none is left on demand."""
        if chosen not in self.done:
            self.done[chosen] = self._pack(chosen, slots, must=must) if chosen else {}
        return self.done[chosen]

    def _pack(self, chosen: tuple[int, ...], slots: Sequence[Slot], *, must: bool) -> dict[int, Phase]:
        sets = self._closed(chosen)
        inside = (sets[:, None] >> np.arange(len(chosen)) & 1).astype(bool)
        seconds = inside @ self.seconds[list(chosen)]
        added = sets[None, :] & ~sets[:, None]
        shrinks = (sets[:, None] & ~sets[None, :]) != 0
        more = np.where(shrinks, np.inf, seconds[None, :] - seconds[:, None])
        cost = np.where(sets != 0, np.inf, 0.0)
        came = []
        for slot in slots:
            through = np.maximum(0.0, more - slot.room) + cost[:, None]
            late = sum(1 << n for n, i in enumerate(chosen) if not slot.serves[i])
            if late:
                through[(added & late) != 0] = np.inf
            came.append(through.argmin(axis=0))
            cost = through.min(axis=0)
        whole = (1 << len(chosen)) - 1
        total = cost + (np.where(sets == whole, 0.0, np.inf) if must else seconds.max() - seconds)
        at = int(total.argmin())
        found = {chosen[n]: DEMAND for n in np.flatnonzero(~inside[at])}
        for slot, origin in zip(reversed(slots), reversed(came), strict=True):
            found |= {chosen[n]: slot.phase for n in np.flatnonzero(inside[at] & ~inside[origin[at]])}
            at = int(origin[at])
        return found

    def _closed(self, chosen: tuple[int, ...]) -> np.ndarray:
        """Sets of chosen operators with all chosen inputs of theirs, as bits."""
        inputs = [sum(1 << chosen.index(j) for j in self.layer.inputs[i] if j in chosen) for i in chosen]
        found = [0]
        for n, needs in enumerate(inputs):
            found += [each | 1 << n for each in found if each & needs == needs]
            if len(found) > _MOST_SETS:
                # Too wide to try all: only what is done in order.
                found = [(1 << n) - 1 for n in range(len(chosen) + 1)]
                break
        return np.array(found, dtype=np.int64 if len(chosen) < 63 else object)
