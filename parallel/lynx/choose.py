"""Chooses, by `evaluate`, among ways to give each layer a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .choices import Choices, candidates
from .evaluate import evaluate
from .groups import Group
from .phases import Policy, expand
from .problem import Assignment, Outcome, Stage

_TRIES = 4
"""How often a choice is made again with what its estimate was off by."""


@dataclass(frozen=True)
class Found:
    """A plan, whether it fits or not."""

    assignment: Assignment
    outcome: Outcome


def choose(
    stage: Stage,
    parts: Sequence[Group],
    ways: Callable[[Group, Sequence[int]], Choices],
    best: Found | None = None,
) -> Found:
    """The best choice by `evaluate`, no worse than `best`; where none fits, the one that needs least."""
    for level, choices in candidates(parts, ways):
        # What an estimate is off by is put right from the outcome, a few times.
        room = float(stage.budget - stage.static - level)
        tried: set[int] = set()
        for _ in range(_TRIES):
            at = max(0, int(np.searchsorted(choices.bytes, room, side="right")) - 1)
            if at in tried:
                break
            tried.add(at)
            found = min(
                (_placed(stage, parts, choices.counts[at], order) for order in (1, -1)), key=lambda f: rank(stage, f)
            )
            if best is None or rank(stage, found) < rank(stage, best):
                best = found
            room = choices.bytes[at] + stage.budget - found.outcome.peak
        if best is not None and rank(stage, best)[0] == 0.0:
            break
    assert best is not None
    return best


def judged(stage: Stage, assignment: Assignment) -> Found:
    """With what it comes to."""
    return Found(assignment, evaluate(stage, assignment))


def rank(stage: Stage, found: Found) -> tuple[float, float]:
    """The lower, the better: what fits by seconds and then bytes, before what does not by bytes."""
    fits = found.outcome.peak <= stage.budget
    return (found.outcome.exposed, found.outcome.peak) if fits else (np.inf, found.outcome.peak)


def _placed(stage: Stage, parts: Sequence[Group], counts: Sequence[Sequence[tuple[int, int]]], order: int) -> Found:
    """Layers in turn take the policies chosen, those with more transient bytes last or first."""
    policies: list[Policy] = [()] * len(stage.layers)
    for group, chosen in zip(parts, counts, strict=True):
        ranked = sorted(chosen, key=lambda each: order * group.front[each[0]].transient)
        taken = [group.front[p].policy for p, n in ranked for _ in range(n)]
        for number, policy in zip(sorted(group.numbers), taken, strict=True):
            policies[number] = policy
    return judged(stage, expand(stage, policies))
