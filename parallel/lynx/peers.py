"""What others do, on the same graph and with the same costs, without windows (METHODS section 2, peers)."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

from .evaluate import evaluate
from .extremes import all_kept, all_on_demand
from .opt import solve_exact
from .problem import Assignment, Backward, Source, Stage
from .solution import InfeasibleError, Solution

ATTENTION_CORE = ("softmax", "attention mask", "attention dropout", "attention")
"""Operators that Megatron's selective recomputation computes again, by the names of `attention_work.py`."""


def solve_none(stage: Stage) -> Solution:
    """Nothing is recomputed. Raises `InfeasibleError` where all of it does not fit."""
    start = time.perf_counter()
    return _fixed(stage, all_kept(stage), "none", start)


def solve_full(stage: Stage) -> Solution:
    """MEGATRON-FULL: of each layer only the input is kept, and the backward computes it all again, collectives too.

    Raises `InfeasibleError` where that does not fit.
    """
    start = time.perf_counter()
    note = "" if stage.replay else "replays collectives, which the other solvers may not here"
    return _fixed(stage, all_on_demand(replace(stage, replay=True)), "full", start, note)


def solve_selective(stage: Stage, core: Collection[str] = ATTENTION_CORE) -> Solution:
    """MEGATRON-SELECTIVE: the attention's core is computed again on demand, everything else is kept.

    `core`: names of operators. Raises `InfeasibleError` where that does not fit.
    """
    start = time.perf_counter()
    found = []
    for layer in stage.layers:
        sources: list[Source] = ["none"] * len(layer.operators)
        for i in reversed(range(len(sources))):
            operator = layer.operators[i]
            wanted = layer.is_needed[i] or any(sources[c] == "demand" for c in layer.readers[i])
            if operator.kind == "compute" and operator.name in core:
                sources[i] = "demand" if wanted else "none"
            elif wanted or operator.kind == "input":
                sources[i] = "keep"
        found.append(tuple(sources))
    assignment = tuple(found)
    note = "" if any("demand" in sources for sources in assignment) else f"no operator is one of {', '.join(core)}"
    return _fixed(stage, assignment, "selective", start, note)


def _fixed(stage: Stage, assignment: Assignment, solver: str, start: float, note: str = "") -> Solution:
    outcome = evaluate(stage, assignment)
    if outcome.peak > stage.budget:
        raise InfeasibleError(outcome.peak, stage.budget, is_exact=True)
    return Solution(
        assignment=assignment,
        solver=solver,
        outcome=outcome,
        search_seconds=time.perf_counter() - start,
        note=note,
    )


def solve_checkmate_once(stage: Stage, *, time_limit: float = 60.0, gap: float = 1e-4) -> Solution:
    """CHECKMATE with at most one recomputation of each tensor: OPT on a stage without windows.

    Raises `InfeasibleError` where nothing fits.
    """
    solution = solve_exact(_without_windows(stage), time_limit=time_limit, gap=gap)
    # No source is a window, so that the assignment is one of the stage with windows as well.
    return replace(solution, solver="checkmate-once", outcome=evaluate(stage, solution.assignment))


def _without_windows(stage: Stage) -> Stage:
    layers = {
        layer: replace(layer, forward=(), backward=tuple(e for e in layer.backward if isinstance(e, Backward)))
        for layer in set(stage.layers)
    }
    return replace(stage, layers=tuple(layers[layer] for layer in stage.layers), stalls=())
