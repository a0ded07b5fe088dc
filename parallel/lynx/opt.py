"""OPT: all layers of a stage jointly, as a mixed-integer program (METHODS section 2, OPT)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from .draft import Draft
from .evaluate import evaluate
from .exact import Model, formulate, is_pooled, read_off
from .extremes import all_kept
from .greedy import shrink, solve_greedy
from .improve import improve
from .mix import solve_mixed
from .problem import Assignment, Outcome, Stage
from .program import Answer
from .solution import InfeasibleError, Solution
from .unpool import unpool

_MOVES = 20_000
"""Single moves weighed after rounding."""
_ROUNDS = 3
"""How often what rounding takes beyond the budget is taken off the budget."""


def solve_exact(stage: Stage, *, time_limit: float = 60.0, gap: float = 1e-4) -> Solution:
    """The best of the program's solution, HEU-MIX and GREEDY, with the bound that the program proves.

    `time_limit`: seconds in all; `gap`: of the exposed seconds, at which the program may stop. Up to two layers, and
    without forward windows, the program says all there is to say; else its bound is that of a relaxation. Raises
    `InfeasibleError` where nothing fits.
    """
    start = time.perf_counter()
    found: list[Assignment] = []
    known: list[int] = []
    for solver in (solve_mixed, solve_greedy):
        try:
            found.append(solver(stage).assignment)
        except InfeasibleError as error:
            known.append(error.smallest)
    judged = [(evaluate(stage, each), each) for each in found]
    bound, is_done = 0.0, True
    if not any(outcome.exposed == 0.0 for outcome, _ in judged):
        rest = time_limit - (time.perf_counter() - start)
        answer, more = _solved(stage, rest, gap)
        # Infinite where it finds nothing, which other solvers may contradict by less than its tolerance.
        bound, is_done = answer.bound / 1e3 if np.isfinite(answer.bound) else 0.0, answer.is_done
        judged += more
    if not judged:
        raise smallest(stage, time_limit=max(1.0, time_limit - (time.perf_counter() - start)), known=known)
    outcome, assignment = min(judged, key=lambda each: (each[0].exposed, each[0].peak))
    return Solution(
        assignment=assignment,
        solver="opt",
        outcome=outcome,
        bound=max(0.0, min(bound, outcome.exposed)),
        search_seconds=time.perf_counter() - start,
        note="" if is_done else f"ended by its limit of {time_limit:g} s",
    )


def _solved(stage: Stage, time_limit: float, gap: float) -> tuple[Answer, list[tuple[Outcome, Assignment]]]:
    """The program's answer for the budget, and what fits of what it found."""
    start = time.perf_counter()
    model = formulate(stage)
    model.program.cost = model.exposed
    first: Answer | None = None
    budget = float(stage.budget)
    for _ in range(_ROUNDS):
        model.program.upper[model.peak] = budget / model.unit
        answer = model.program.solve(time_limit=max(1.0, time_limit - (time.perf_counter() - start)), gap=gap)
        first = first or answer
        if answer.values is None:
            return first, []
        draft = Draft(stage, list(rounded(model, answer.values)))
        excess = draft.peak - stage.budget
        if is_pooled(stage):
            shrink(draft)
        if draft.peak <= stage.budget:
            improve(draft, tries=_MOVES if is_pooled(stage) else 0)
            return first, [(evaluate(stage, draft.assignment), draft.assignment)]
        # By the solver's tolerance, or by what the pooled windows do not see.
        budget -= 1.01 * excess
    assert first is not None
    return first, []


def rounded(model: Model, values: np.ndarray) -> Assignment:
    """The assignment of a point of the program."""
    assignment = read_off(model, values)
    return unpool(model.stage, assignment) if is_pooled(model.stage) else assignment


def smallest(stage: Stage, *, time_limit: float = 60.0, known: Sequence[int] = ()) -> InfeasibleError:
    """The error that says the smallest budget in which the stage fits; `known`: some in which it does."""
    model = formulate(stage)
    model.program.cost = {model.peak: 1.0}
    answer = model.program.solve(time_limit=time_limit)
    # Everything kept, where the limit ended the search too soon.
    assignment = all_kept(stage) if answer.values is None else rounded(model, answer.values)
    peak = min(evaluate(stage, assignment).peak, *known, evaluate(stage, all_kept(stage)).peak)
    is_exact = answer.is_done and peak <= answer.bound * model.unit * (1 + 1e-6) + 0.5
    return InfeasibleError(peak, stage.budget, is_exact=is_exact)
