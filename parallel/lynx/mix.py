"""HEU-MIX: equal layers share out neighbouring policies of the one-layer front (METHODS section 2).

With one policy for all layers, a budget between the needs of two policies is wasted. Here, of n equal layers, j take
one policy of the front's convex hull, all but one of the rest take the next, and one takes any; the stage's last layer,
which has no windows before its backward, has a front of its own. A small knapsack chooses for all structures together.
HEU (`heu.py`) makes the same choice among plans with one policy for each structure. In the end single outputs are moved
(`improve.py`), where windows still have room or the budget has: of that plan, of HEU's and of everything on demand, for
moves from the worse of them may lead farther.
"""

from __future__ import annotations

import time

from .choices import mixed, one_each
from .choose import Found, choose, judged, rank
from .draft import Draft, Known
from .evaluate import evaluate
from .exchange import exchange
from .extremes import all_kept, all_on_demand
from .greedy import shrink
from .groups import Fronts, groups
from .improve import improve
from .problem import Stage
from .solution import InfeasibleError, Solution

_MOVES = 800
"""Single moves weighed at the end."""


def solve_mixed(stage: Stage) -> Solution:
    """HEU-MIX: no worse than HEU. Raises `InfeasibleError` where it finds nothing that fits."""
    start = time.perf_counter()
    assignment = all_kept(stage)
    if (outcome := evaluate(stage, assignment)).peak > stage.budget:
        fronts: Fronts = {}
        starts = [choose(stage, groups(stage, fronts, last_apart=False), one_each)]
        if starts[0].outcome.exposed > 0.0 or starts[0].outcome.peak > stage.budget:
            better = choose(stage, groups(stage, fronts, last_apart=True), mixed, starts[0])
            starts += [found for found in (better, judged(stage, all_on_demand(stage))) if found is not starts[0]]
        known: Known = {}
        best = min((_refined(stage, each, known) for each in starts), key=lambda each: rank(stage, each))
        assignment, outcome = best.assignment, best.outcome
        if outcome.peak > stage.budget:
            raise InfeasibleError(outcome.peak, stage.budget, is_exact=False)
    return Solution(
        assignment=assignment,
        solver="heu-mix",
        outcome=outcome,
        search_seconds=time.perf_counter() - start,
    )


def _refined(stage: Stage, found: Found, known: Known) -> Found:
    """Moved until it fits, and where it does, moved for time."""
    draft = Draft(stage, list(found.assignment), known)
    shrink(draft)
    if draft.peak <= stage.budget:
        improve(draft, tries=_MOVES)
        if exchange(draft, tries=_MOVES):
            improve(draft, tries=_MOVES)
    return judged(stage, draft.assignment)
