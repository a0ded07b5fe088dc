"""HEU: one policy for each structure of layers, the same in all layers of that structure (METHODS section 2, HEU).

Deviation: the one-layer problem is solved along its whole Pareto front (`front.py`) instead of by an integer program
for the budget at hand: the front takes less time, and HEU-MIX needs it anyway.
"""

from __future__ import annotations

import time

from .choices import one_each
from .choose import choose
from .groups import groups
from .problem import Stage
from .solution import InfeasibleError, Solution


def solve_heu(stage: Stage) -> Solution:
    """Raises `InfeasibleError` where no such plan fits, though others might."""
    start = time.perf_counter()
    found = choose(stage, groups(stage, {}, last_apart=False), one_each)
    if found.outcome.peak > stage.budget:
        raise InfeasibleError(found.outcome.peak, stage.budget, is_exact=False)
    return Solution(
        assignment=found.assignment,
        solver="heu",
        outcome=found.outcome,
        search_seconds=time.perf_counter() - start,
    )
