"""One stage as a mixed-integer linear program (METHODS L1-L5), and what its solution says.

Variables: of each output `keep`, `at` each window that may compute it, and `demand` at each backward operator that may
be its first use: its own first reader, or that of an operator computed on demand from it. Whether an output is there
at an event is a sum of those, up to its last reader in the backward; what only recomputations still read needs a
variable of its own.

A layer may use the forward windows of all layers, the stalls, and the backward windows of itself and of the layer
before it in the backward: a horizon of two layers. With more than two layers, forward windows become one. That breaks
the symmetry of equal layers, whose windows are as good for one as for another, and is a relaxation: the bound holds,
and `unpool.py` gives each operator a window of its own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from .problem import Assignment, Source, Stage, Window
from .program import Program, Sum


@dataclass(frozen=True)
class Model:
    """The program of a stage, and what its variables are."""

    stage: Stage
    program: Program
    keep: dict[tuple[int, int], int]
    """By layer and operator; one without is kept always."""
    at: dict[tuple[int, int], dict[int, int]]
    """By event: of computing it in that window."""
    demand: dict[tuple[int, int], dict[int, int]]
    """By event: of computing it there on demand."""
    peak: int
    """Bytes at most, in units."""
    exposed: Sum
    """The objective, in milliseconds."""
    unit: float
    """Bytes."""


def formulate(stage: Stage) -> Model:
    """The stage as a program, without objective or budget."""
    unit = max(1.0, sum(o.bytes for layer in stage.layers for o in layer.operators) / len(stage.layers) / 100)
    program = Program()
    return _Builder(stage, program, _places(stage), unit).build()


def is_pooled(stage: Stage) -> bool:
    """Whether all forward windows are one."""
    return len(stage.layers) > 2


def _forward(stage: Stage) -> list[int]:
    return [at for at, event in enumerate(stage.events) if not event.backward and event.layer >= 0]


def _places(stage: Stage) -> dict[int, int]:
    """Of each window, the event that stands for it."""
    found = {at: at for at, event in enumerate(stage.events) if event.window is not None}
    forward = _forward(stage)
    if is_pooled(stage):
        found |= dict.fromkeys(forward, forward[-1] if forward else 0)
    return found


@dataclass
class _Builder:
    stage: Stage
    program: Program
    places: dict[int, int]
    unit: float
    keep: dict[tuple[int, int], int] = field(default_factory=dict)
    at: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)
    demand: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)
    alive: dict[object, int] = field(default_factory=dict)

    def build(self) -> Model:
        for number in range(len(self.stage.layers)):
            self._sources(number)
            self._dependencies(number)
        exposed = self._exposed()
        peak = self._memory()
        return Model(self.stage, self.program, self.keep, self.at, self.demand, peak, exposed, self.unit)

    # L1, L3

    def _sources(self, number: int) -> None:
        stage, layer = self.stage, self.stage.layers[number]
        first = [reads[0] if reads else None for reads in stage.reads[number]]
        for i in reversed(range(len(layer.operators))):
            operator, me = layer.operators[i], (number, i)
            self.at[me], self.demand[me] = {}, {}
            # What costs no bytes is kept: nothing is better than that.
            if operator.kind == "input" or operator.bytes == 0:
                continue
            self.keep[me] = self.program.variable()
            if operator.kind == "compute":
                self.at[me] = {at: self.program.variable() for at in self._windows(number, i)}
            if operator.kind == "compute" or stage.replay:
                uses = {at for c in layer.readers[i] for at in self.demand[number, c]}
                if first[i] is not None:
                    uses = {at for at in uses if at < first[i]} | {first[i]}
                self.demand[me] = {at: self.program.variable() for at in sorted(uses)}
            total = dict.fromkeys([self.keep[me], *self.at[me].values(), *self.demand[me].values()], 1.0)
            self.program.row(total, low=1.0 if layer.is_needed[i] else 0.0, high=1.0)

    def _windows(self, number: int, i: int) -> list[int]:
        """Events that stand for the windows that may compute an output."""
        events, before = self.stage.events, self.stage.last_window[number][i]
        near = (number, number + 1)
        found = {
            place
            for at, place in self.places.items()
            if at < before and (not events[at].backward or events[at].layer in near)
        }
        return sorted(found)

    # L2

    def _dependencies(self, number: int) -> None:
        layer = self.stage.layers[number]
        for i, inputs in enumerate(layer.inputs):
            me = (number, i)
            for j in inputs:
                if (number, j) in self.keep:
                    self._follows(me, (number, j))
            for at, variable in self.demand[me].items():
                if at in self.stage.reads[number][i][:1]:
                    continue
                # On demand before the backward itself reads it: for another that is.
                readers = {self.demand[number, c][at]: -1.0 for c in layer.readers[i] if at in self.demand[number, c]}
                self.program.row({variable: 1.0, **readers}, high=0.0)
            if not layer.is_needed[i] and me in self.keep:
                self._is_of_use(number, i)

    def _follows(self, me: tuple[int, int], other: tuple[int, int]) -> None:
        """Whatever `me` is computed from is there by then."""
        for at in self.at[me]:
            terms = {self.keep[other]: -1.0}
            terms |= {v: 1.0 for e, v in self.at[me].items() if e <= at}
            terms |= {v: -1.0 for e, v in self.at[other].items() if e <= at}
            self.program.row(terms, high=0.0)
        for at in self.demand[me]:
            terms = {self.keep[other]: -1.0}
            terms |= {v: 1.0 for e, v in (*self.at[me].items(), *self.demand[me].items()) if e <= at}
            terms |= {v: -1.0 for e, v in (*self.at[other].items(), *self.demand[other].items()) if e <= at}
            self.program.row(terms, high=0.0)

    def _is_of_use(self, number: int, i: int) -> None:
        """What the backward does not read is computed again for a recomputation, and not before..."""
        terms = dict.fromkeys(self._when(number, i), 1.0)
        for c in self.stage.layers[number].readers[i]:
            terms |= dict.fromkeys(self._when(number, c), -1.0)
        self.program.row(terms, high=0.0)

    def _when(self, number: int, i: int, low: int = -1, high: int = 1 << 60) -> list[int]:
        """Variables of computing an output again, from event `low` up to event `high`."""
        both = (*self.at[number, i].items(), *self.demand[number, i].items())
        return [variable for at, variable in both if low <= at <= high]

    # L5

    def _exposed(self) -> Sum:
        load: dict[int, Sum] = defaultdict(dict)
        exposed: Sum = {}
        for (number, i), where in self.at.items():
            milliseconds = 1e3 * self.stage.layers[number].operators[i].seconds
            exposed |= dict.fromkeys(self.demand[number, i].values(), milliseconds)
            for at, variable in where.items():
                load[at][variable] = milliseconds
        room: dict[int, float] = defaultdict(float)
        largest: dict[int, float] = defaultdict(float)
        for at, place in self.places.items():
            window = self.stage.events[at].what
            assert isinstance(window, Window)
            room[place] += 1e3 * window.room
            largest[place] = max(largest[place], 1e3 * window.room)
        for at, terms in load.items():
            over = self.program.variable(upper=np.inf, is_integral=False)
            self.program.row({**terms, over: -1.0}, high=room[at])
            exposed[over] = 1.0
            # What is larger than the largest window is exposed in part wherever it is.
            parts = {variable: size - largest[at] for variable, size in terms.items() if size > largest[at]}
            if parts:
                self.program.row({**parts, over: -1.0}, high=0.0)
        return exposed

    # L4

    def _memory(self) -> int:
        """The variable that is no less than the bytes at any event."""
        stage, program = self.stage, self.program
        peak = program.variable(upper=np.inf, is_integral=False)
        kept = program.variable(upper=np.inf, is_integral=False)
        terms = {variable: stage.in_flight * self._bytes(*me) for me, variable in self.keep.items()}
        always = sum(self._bytes(number, i) for number, i in self.at if (number, i) not in self.keep)
        program.row({**terms, kept: -1.0}, high=-always * stage.in_flight - stage.static / self.unit)
        program.row({kept: 1.0, peak: -1.0}, high=0.0)
        early = self._early()
        points = {at for where in (*self.at.values(), *self.demand.values()) for at in where}
        forward = _forward(stage)
        if is_pooled(stage) and forward:
            points = {at for at in points if at > forward[-1]} | {forward[-1] + 1}
        for at in sorted(points):
            event = stage.events[at]
            near = range(max(0, event.layer - 1), event.layer + 1) if event.backward else range(len(stage.layers))
            there: Sum = {kept: 1.0, peak: -1.0}
            for number in near:
                self._add(there, number, at)
            if near and near[0] > 0:
                there[early[near[0] - 1]] = 1.0
            program.row(there, high=0.0)
        return peak

    def _early(self) -> list[int]:
        """Of each layer, bytes that it and those below have from forward windows and stalls as the backward begins."""
        begin = next(at for at, event in enumerate(self.stage.events) if event.backward)
        found: list[int] = []
        for number in range(len(self.stage.layers)):
            terms: Sum = {found[-1]: 1.0} if found else {}
            self._add(terms, number, begin - 1, after=True)
            found.append(self.program.variable(upper=np.inf, is_integral=False))
            self.program.row({**terms, found[-1]: -1.0}, high=0.0)
        return found

    def _bytes(self, number: int, i: int) -> float:
        return self.stage.layers[number].operators[i].bytes / self.unit

    def _add(self, there: Sum, number: int, at: int, *, after: bool = False) -> None:
        """Adds what a layer's recomputed outputs occupy at an event (`after`: of it, those still read later)."""
        stage, layer = self.stage, self.stage.layers[number]
        for i in range(len(layer.operators)):
            have = self._when(number, i, high=at)
            if not have:
                continue
            last = max(stage.reads[number][i], default=-1)
            if at + after <= last:
                there |= dict.fromkeys(have, self._bytes(number, i))
                continue
            users = [self._when(number, c, low=at + after) for c in layer.readers[i]]
            users = [each for each in users if each]
            arriving = [] if after else self._when(number, i, low=at, high=at)
            if not users and not arriving:
                continue
            key = (number, i, tuple(have), tuple(map(tuple, users)), tuple(arriving))
            if key not in self.alive:
                self.alive[key] = self._alive(have, users, arriving, number, i, at + after)
            there[self.alive[key]] = self._bytes(number, i)

    def _alive(self, have: list[int], users: list[list[int]], arriving: list[int], number: int, i: int, at: int) -> int:
        """A variable that is 1 where an output is there at `at` for recomputations alone, or has just come."""
        alive = self.program.variable(is_integral=False)
        for each in users:
            self.program.row({**dict.fromkeys(have, 1.0), **dict.fromkeys(each, 1.0), alive: -1.0}, high=1.0)
        if arriving:
            self.program.row({**dict.fromkeys(arriving, 1.0), alive: -1.0}, high=0.0)
        if not self.stage.layers[number].is_needed[i]:
            # Somebody reads it: now or later, where nobody has yet.
            done = [v for c in self.stage.layers[number].readers[i] for v in self._when(number, c, high=at - 1)]
            self.program.row({**dict.fromkeys(have, 1.0), **dict.fromkeys(done, -1.0), alive: -1.0}, high=0.0)
        return alive


def read_off(model: Model, values: np.ndarray) -> Assignment:
    """The assignment that a point of the program is; forward windows are still one where they were."""
    found = []
    for number, layer in enumerate(model.stage.layers):
        sources: list[Source] = []
        for i in range(len(layer.operators)):
            me = (number, i)
            if me not in model.keep:
                sources.append("keep")
                continue
            at = next((at for at, v in model.at[me].items() if values[v] > 0.5), None)
            if at is not None:
                sources.append(at)
            elif any(values[v] > 0.5 for v in model.demand[me].values()):
                sources.append("demand")
            else:
                sources.append("keep" if values[model.keep[me]] > 0.5 else "none")
        found.append(tuple(sources))
    return tuple(found)
