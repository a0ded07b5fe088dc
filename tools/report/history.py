"""A run's slot counts over its steps, in few enough parts to be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...moe.ledger import SLOTS
from .accounts import OF_CHOICES
from .runs import Line

MOST_BINS = 100
"""Neighbouring lines of metrics are added up until no more bins than this are left: exact, as they are totals."""


@dataclass(frozen=True)
class History:
    """Totals of consecutive parts of a run."""

    edges: Sequence[int]
    """[bins + 1]: bin i counts the steps edges[i] < step <= edges[i + 1]."""
    slots: Mapping[str, np.ndarray]
    """For each of `moe.ledger.SLOTS`: int64 [bins, layers]."""

    @property
    def num_layers(self) -> int:
        return self.slots["kept"].shape[1]

    def of_layer(self, layer: int) -> History:
        """The same of one layer."""
        return History(self.edges, {name: counts[:, layer : layer + 1] for name, counts in self.slots.items()})

    def parts(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """For each of `names` its part of their sum, all layers together: float64 [bins]; 0 where the sum is 0."""
        whole = np.maximum(1, sum(self.slots[name].sum(1) for name in names))
        return {name: self.slots[name].sum(1) / whole for name in names}

    def totals(self, names: Sequence[str]) -> dict[str, float]:
        """For each of `names` its part of their sum over all bins and layers; 0 where the sum is 0."""
        whole = max(1, sum(int(self.slots[name].sum()) for name in names))
        return {name: int(self.slots[name].sum()) / whole for name in names}

    def unserved(self, top_k: int) -> np.ndarray:
        """Tokens that no expert served as a part of all tokens, mean over the layers: float64 [bins]."""
        choices = sum(self.slots[name].sum(1) for name in OF_CHOICES)
        return self.slots["unserved"].sum(1) * top_k / np.maximum(1, choices)


def history_of(lines: Sequence[Line]) -> History:
    """The history that `lines` (at least one, each with slots) tell; a gap between lines goes to the later one."""
    every = math.ceil(len(lines) / MOST_BINS)
    starts = list(range(0, len(lines), every))
    lasts = [lines[min(start + every, len(lines)) - 1]["step"] for start in starts]
    counts = {name: np.array([line["slots"][name] for line in lines], dtype=np.int64) for name in SLOTS}
    return History(
        edges=[lines[0]["step"] - lines[0]["ledger_steps"], *lasts],
        slots={name: np.add.reduceat(count, starts, axis=0) for name, count in counts.items()},
    )
