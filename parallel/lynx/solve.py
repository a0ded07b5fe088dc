"""Every solver by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .checkmate import solve_checkmate
from .greedy import solve_greedy
from .heu import solve_heu
from .mix import solve_mixed
from .opt import solve_exact
from .peers import solve_checkmate_once, solve_full, solve_none, solve_selective
from .problem import Stage
from .solution import Solution

SOLVERS: Mapping[str, Callable[[Stage, float], Solution]] = {
    "heu-mix": lambda stage, _: solve_mixed(stage),
    "heu": lambda stage, _: solve_heu(stage),
    "opt": lambda stage, limit: solve_exact(stage, time_limit=limit),
    "greedy": lambda stage, _: solve_greedy(stage),
    "none": lambda stage, _: solve_none(stage),
    "full": lambda stage, _: solve_full(stage),
    "selective": lambda stage, _: solve_selective(stage),
    "checkmate": lambda stage, limit: solve_checkmate(stage, time_limit=limit),
    "checkmate-once": lambda stage, limit: solve_checkmate_once(stage, time_limit=limit),
}


def solve(stage: Stage, solver: str = "heu-mix", time_limit: float = 60.0) -> Solution:
    """The assignment that `solver` chooses; `time_limit`: seconds, for those that may take long.

    Raises `InfeasibleError` where the solver finds nothing that fits, and ValueError where there is no such solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: {solver!r} is unknown; use one of {', '.join(SOLVERS)}")
    return SOLVERS[solver](stage, time_limit)
