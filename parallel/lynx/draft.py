"""An assignment under change: what another choice for one layer would come to, at the cost of that layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .evaluate import Part, part, wrong_order
from .problem import Assignment, Source, Stage

Sources = tuple[Source, ...]
Known = dict[tuple[int, Sources, int, Source], tuple[Sources, Part] | None]
"""What moves of one stage come to: by layer, its sources, output and new source; None for what cannot be."""


@dataclass(frozen=True)
class Trial:
    """A layer's other sources, and what they would change."""

    number: int
    sources: Sources
    part: Part
    seconds: float
    """Exposed, more or less than now."""
    lasting: int
    """Bytes kept, or there from forward windows when the backward begins, more or less than now."""
    peak: int
    """Bytes at most, all in."""


@dataclass
class Draft:
    """An assignment that keeps L1-L3, and what it takes."""

    stage: Stage
    layers: list[Sources]
    known: Known = field(default_factory=dict)
    """May be shared among drafts of one stage."""
    parts: list[Part] = field(init=False)
    left: list[float] = field(init=False)
    """Of each event, seconds that it could still hide; below 0: seconds that spill over."""
    change: np.ndarray = field(init=False)
    """Of each event, bytes that come less those that went."""

    def __post_init__(self) -> None:
        events = self.stage.events
        self.left = [event.window.room if event.window else 0.0 for event in events]
        self.change = np.zeros(len(events) + 1, dtype=np.int64)
        self.parts = [part(self.stage, number, sources) for number, sources in enumerate(self.layers)]
        for each in self.parts:
            for at, seconds in each.load.items():
                self.left[at] -= seconds
            _shift(self.change, each, 1)
        self._start = next(at for at, event in enumerate(events) if event.backward)

    @property
    def assignment(self) -> Assignment:
        """As it is now."""
        return tuple(self.layers)

    @property
    def exposed(self) -> float:
        """Seconds that nothing hides."""
        return sum(each.demand for each in self.parts) + sum(-left for left in self.left if left < 0.0)

    @property
    def peak(self) -> int:
        """Bytes at most, all in."""
        kept = sum(each.kept for each in self.parts)
        return int(self.change.cumsum().max()) + self.stage.static + self.stage.in_flight * kept

    def exposed_of(self, number: int, i: int) -> float:
        """Seconds of one output's recomputation that nothing hides, as far as they are its own."""
        source, seconds = self.layers[number][i], self.stage.layers[number].operators[i].seconds
        if isinstance(source, int):
            return min(seconds, max(0.0, -self.left[source]))
        return seconds if source == "demand" else 0.0

    def moved(self, number: int, i: int, to: Source) -> Trial | None:
        """What one output from elsewhere, with what must follow, would come to; None where that cannot be."""
        key = (number, self.layers[number], i, to)
        if key not in self.known:
            sources = _moved(self.stage, number, self.layers[number], i, to)
            self.known[key] = None if sources is None else (sources, part(self.stage, number, sources))
        found = self.known[key]
        return None if found is None else self._weighed(number, *found)

    def weigh(self, number: int, sources: Sources) -> Trial:
        """What other sources of a layer, which keep L1-L3, would come to."""
        return self._weighed(number, sources, part(self.stage, number, sources))

    def _weighed(self, number: int, sources: Sources, new: Part) -> Trial:
        old = self.parts[number]
        seconds = new.demand - old.demand
        for at in {*old.load, *new.load}:
            left = self.left[at] + old.load.get(at, 0.0) - new.load.get(at, 0.0)
            seconds += max(0.0, -left) - max(0.0, -self.left[at])
        change = self.change.copy()
        _shift(change, old, -1)
        _shift(change, new, 1)
        kept = sum(each.kept for each in self.parts) + new.kept - old.kept
        return Trial(
            number=number,
            sources=sources,
            part=new,
            seconds=seconds,
            lasting=self._lasting(new) - self._lasting(old),
            peak=int(change.cumsum().max()) + self.stage.static + self.stage.in_flight * kept,
        )

    def _lasting(self, each: Part) -> int:
        return self.stage.in_flight * each.kept + sum(size for at, size in each.change.items() if at < self._start)

    def take(self, trial: Trial) -> None:
        """Makes the change."""
        old, new = self.parts[trial.number], trial.part
        for at, seconds in old.load.items():
            self.left[at] += seconds
        for at, seconds in new.load.items():
            self.left[at] -= seconds
        _shift(self.change, old, -1)
        _shift(self.change, new, 1)
        self.parts[trial.number] = new
        self.layers[trial.number] = trial.sources


def _shift(change: np.ndarray, each: Part, sign: int) -> None:
    for at, size in each.change.items():
        change[at] += sign * size


def _moved(stage: Stage, number: int, sources: Sources, i: int, to: Source) -> Sources | None:
    """A layer's sources with one output from elsewhere, and with what must follow; None where that cannot be.

    What it is computed from is computed with it, where it is not there by then; what waits for it in a window, but is
    now too early, is on demand; what nobody reads any longer is dropped.
    """
    layer = stage.layers[number]
    if layer.operators[i].kind == "input":
        return None
    found = list(sources)
    found[i] = to
    for c in range(i + 1, len(found)):
        if isinstance(found[c], int) and any(_is_late(found[j], found[c]) for j in layer.inputs[c] if j >= i):
            found[c] = "demand"
    for c in reversed(range(len(found))):
        source = found[c]
        if source == "keep" or source == "none":
            continue
        for j in layer.inputs[c]:
            if found[j] == "none" or _is_late(found[j], source):
                found[j] = source
    for j in reversed(range(len(found))):
        is_read = layer.is_needed[j] or any(found[c] not in ("keep", "none") for c in layer.readers[j])
        if layer.operators[j].kind != "input" and layer.operators[j].bytes and not is_read:
            found[j] = "none"
    for j, source in enumerate(found):
        may = ("keep", "none", "demand") if stage.replay else ("keep", "none")
        if layer.operators[j].kind == "collective" and source not in may:
            return None
        if isinstance(source, int) and source >= stage.last_window[number][j]:
            return None
    result = tuple(found)
    return result if result != sources and not any(wrong_order(stage, number, result)) else None


def _is_late(source: Source, reader: Source) -> bool:
    """Whether a window's operator cannot wait for what comes from `source`."""
    return isinstance(reader, int) and (source == "demand" or (isinstance(source, int) and source > reader))
