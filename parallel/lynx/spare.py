"""What a plan may keep beyond need: the budget that is left, spent on less recomputation.

What a window hides costs nothing in the model (METHODS L5), so a solver has no reason to prefer keeping. Where it
runs, computing takes cores and bandwidth from what is on its way, and measured windows differ from step to step.
"""

from __future__ import annotations

from .draft import Draft
from .evaluate import Part
from .problem import Assignment, Stage

_LEAST = 1e-12
"""Seconds that are nothing."""


def keep_what_fits(stage: Stage, assignment: Assignment) -> Assignment:
    """`assignment` with outputs kept that were computed again, the most seconds for bytes first, within the budget.

    Nothing more is exposed by it, and less is computed.
    """
    draft = Draft(stage, list(assignment))
    has_moved = True
    while has_moved:
        has_moved = False
        for number, i in _computed_again(draft):
            trial = draft.moved(number, i, "keep")
            if trial is None or trial.peak > stage.budget or trial.seconds > _LEAST:
                continue
            if _recomputed(trial.part) < _recomputed(draft.parts[number]) - _LEAST:
                draft.take(trial)
                has_moved = True
    return draft.assignment


def _computed_again(draft: Draft) -> list[tuple[int, int]]:
    """Layer and operator, the most seconds for the bytes of keeping it first."""
    found: list[tuple[float, int, int]] = []
    for number, sources in enumerate(draft.layers):
        for i, (operator, source) in enumerate(zip(draft.stage.layers[number].operators, sources, strict=True)):
            if source not in ("keep", "none") and operator.bytes:
                found.append((-operator.seconds / operator.bytes, number, i))
    return [(number, i) for _, number, i in sorted(found)]


def _recomputed(part: Part) -> float:
    return part.demand + sum(part.load.values())
