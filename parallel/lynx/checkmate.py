"""CHECKMATE (Jain et al. 2020, arXiv 1910.02653): R and S by step, so that a tensor may be recomputed more than once.

Steps are the backward operators, and bytes are counted at each as `evaluate` counts them. What is kept from the forward
(K) is there for all micro-batches in flight and throughout, so that S is needed only within one layer's backward.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from .evaluate import violations
from .peers import solve_checkmate_once
from .problem import Assignment, Backward, Outcome, Source, Stage
from .program import Program, Sum
from .solution import InfeasibleError, Solution


def solve_checkmate(stage: Stage, *, time_limit: float = 60.0, gap: float = 1e-4) -> Solution:
    """The best found within `time_limit` seconds, which starts from one recomputation per tensor.

    What is computed more than once, or before its first use, is `demand` in the assignment; the outcome is then that
    of the program and not of `evaluate`, which the note says. Raises `InfeasibleError` where it finds nothing that
    fits.
    """
    start = time.perf_counter()
    once: Solution | None = None
    error: InfeasibleError | None = None
    try:
        once = solve_checkmate_once(stage, time_limit=time_limit / 2, gap=gap)
    except InfeasibleError as raised:
        error = raised
    if once is not None and once.outcome.exposed == 0.0:
        return replace(once, solver="checkmate")
    rows = _Rows(stage)
    answer = rows.program.solve(time_limit=max(1.0, time_limit - (time.perf_counter() - start)), gap=gap)
    notes = [] if answer.is_done else [f"ended by its limit of {time_limit:g} s"]
    best = None if once is None else (once.outcome, once.assignment)
    if answer.values is not None:
        assignment, outcome, many = rows.read_off(answer.values)
        fits = outcome.peak <= stage.budget
        if fits and (best is None or outcome.exposed < best[0].exposed):
            best = (outcome, assignment)
            if many:
                notes.append(f"computed more than once: {many}")
            elif violations(stage, assignment):
                notes.append("some are computed before their first use")
    if best is None:
        assert error is not None
        raise InfeasibleError(error.smallest, stage.budget, is_exact=False, note="with one recomputation per tensor")
    outcome, assignment = best
    return Solution(
        assignment=assignment,
        solver="checkmate",
        outcome=outcome,
        bound=max(0.0, min(answer.bound / 1e3, outcome.exposed)),
        search_seconds=time.perf_counter() - start,
        note="; ".join(notes),
    )


class _Rows:
    """The program, and its variables by layer, step and operator."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.program = Program()
        self.unit = max(1.0, sum(o.bytes for layer in stage.layers for o in layer.operators) / len(stage.layers) / 100)
        self.K: dict[tuple[int, int], int] = {}
        self.R: dict[tuple[int, int, int], int] = {}
        self.S: dict[tuple[int, int, int], int] = {}
        self.steps = [[each for each in layer.backward if isinstance(each, Backward)] for layer in stage.layers]
        self.always = 0.0
        for number in range(len(stage.layers)):
            self._variables(number)
        self.kept = self.program.variable(upper=np.inf, is_integral=False)
        terms = {self.K[key]: stage.in_flight * self._bytes(*key) for key in self.K}
        self.program.row({**terms, self.kept: -1.0}, high=-self.always - stage.static / self.unit)
        room = stage.budget / self.unit
        self.program.row({self.kept: 1.0}, high=room)
        for number in range(len(stage.layers)):
            self._constraints(number, room)

    def _bytes(self, number: int, i: int) -> float:
        return self.stage.layers[number].operators[i].bytes / self.unit

    def _variables(self, number: int) -> None:
        layer = self.stage.layers[number]
        for i, operator in enumerate(layer.operators):
            if operator.kind == "input" or operator.bytes == 0:
                self.always += self.stage.in_flight * self._bytes(number, i)
                continue
            self.K[number, i] = self.program.variable()
            for t in range(len(self.steps[number])):
                if operator.kind == "compute" or self.stage.replay:
                    self.R[number, t, i] = self.program.variable()
                    self.program.cost[self.R[number, t, i]] = 1e3 * operator.seconds
                    if t:
                        self.S[number, t, i] = self.program.variable()

    def _there(self, number: int, t: int, i: int) -> Sum:
        """Kept, held since an earlier step, or computed in this one."""
        found = {self.K[number, i]: 1.0}
        for held in (self.S, self.R):
            if (number, t, i) in held:
                found[held[number, t, i]] = 1.0
        return found

    def _constraints(self, number: int, room: float) -> None:
        layer, program = self.stage.layers[number], self.program
        for t, step in enumerate(self.steps[number]):
            there: Sum = {self.kept: 1.0}
            for i in range(len(layer.operators)):
                if (number, i) not in self.K:
                    continue
                mine = self._there(number, t, i)
                program.row(mine, low=float(layer.operators[i].name in step.reads), high=1.0)
                if (number, t, i) not in self.R:
                    continue
                there |= dict.fromkeys([v for v in mine if v != self.K[number, i]], self._bytes(number, i))
                for j in layer.inputs[i]:
                    if (number, j) in self.K:
                        terms = dict.fromkeys(self._there(number, t, j), -1.0)
                        program.row({self.R[number, t, i]: 1.0, **terms}, high=0.0)
                if t:
                    before = {v: -1.0 for v in self._there(number, t - 1, i) if v != self.K[number, i]}
                    program.row({self.S[number, t, i]: 1.0, **before}, high=0.0)
            program.row(there, high=room)

    def read_off(self, values: np.ndarray) -> tuple[Assignment, Outcome, int]:
        """What a solution comes to, and how many tensors it computes more than once."""
        stage = self.stage
        on = values > 0.5
        found: list[tuple[Source, ...]] = []
        kept, most, exposed, many = 0, 0, 0.0, 0
        for number, layer in enumerate(stage.layers):
            sources: list[Source] = []
            held = [0] * len(self.steps[number])
            for i, operator in enumerate(layer.operators):
                times = [t for t in range(len(held)) if (number, t, i) in self.R and on[self.R[number, t, i]]]
                is_kept = (number, i) not in self.K or bool(on[self.K[number, i]])
                sources.append("keep" if is_kept else "demand" if times else "none")
                kept += is_kept * operator.bytes
                exposed += len(times) * operator.seconds
                many += len(times) > 1
                for t in range(len(held)):
                    held[t] += operator.bytes * (t in times or ((number, t, i) in self.S and on[self.S[number, t, i]]))
            most = max(most, *held, 0)
            found.append(tuple(sources))
        peak = stage.static + stage.in_flight * kept + most
        return tuple(found), Outcome(exposed=exposed, hidden=0.0, peak=peak, kept=kept, peak_at=-1), many
