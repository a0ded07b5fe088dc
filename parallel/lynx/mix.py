"""HEU-MIX: equal layers share out neighbouring policies of the one-layer front (METHODS section 2).

With one policy for all layers, a budget between the needs of two policies is wasted. Here, of n equal layers, j take
one policy of the front's convex hull, all but one of the rest take the next, and one takes any; the stage's last layer,
which has no windows before its backward, has a front of its own. A small knapsack chooses for all structures together.
HEU (`heu.py`) makes the same choice among plans with one policy for each structure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .draft import Draft
from .evaluate import evaluate
from .extremes import all_kept, all_on_demand
from .front import Priced, front
from .greedy import shrink
from .improve import improve
from .phases import Policy, Structure, expand, structures
from .problem import Assignment, Outcome, Stage
from .solution import InfeasibleError, Solution

_LEVELS = 6
"""Bounds on transient bytes that are tried."""
_TRIES = 4
_MOVES = 1500
"""Single moves weighed at the end."""
_MOST_CHOICES = 300
"""Of a structure or of several, once none of them beats another."""


Fronts = dict[tuple[Structure, tuple[float, ...]], tuple[Priced, ...]]
"""Known ones, by structure and seconds reserved."""


@dataclass(frozen=True)
class Group:
    """Layers of one structure, from the first to the last, and the policies they may take."""

    numbers: tuple[int, ...]
    front: tuple[Priced, ...]
    has_ends: bool
    """Whether the last of several equal layers is the stage's last."""


@dataclass(frozen=True)
class Choices:
    """Ways to give each layer of some groups a policy, by rising bytes and falling seconds."""

    bytes: np.ndarray
    seconds: np.ndarray
    counts: list[tuple[tuple[tuple[int, int], ...], ...]]
    """Of each way and group, (place in the front, number of layers)."""


def groups(stage: Stage, fronts: Fronts, *, last_apart: bool) -> list[Group]:
    """Layers by structure, with the front of each. `last_apart`: the stage's last layer is a structure of its own."""
    numbers: dict[Structure, list[int]] = {}
    for number, structure in enumerate(structures(stage)):
        numbers.setdefault(structure, []).append(number)
    last = structures(stage)[-1]
    alike = Structure(last.layer, last.layer)
    if not last_apart and alike in numbers:
        numbers[alike] += numbers.pop(last)
    found: dict[Structure, Group] = {}
    # From the stage's end, so that what a layer itself may use of its windows is known to the layer before it.
    for structure, whose in sorted(numbers.items(), key=lambda item: -item[1][-1]):
        neighbour = next((g for s, g in found.items() if s.layer == structure.after), None)
        reserved = (
            () if structure.after in (None, structure.layer) or neighbour is None else _own_load(stage, neighbour)
        )
        has_ends = structure == alike and len(stage.layers) - 1 in whose
        key = (structure, tuple(reserved))
        if key not in fronts:
            fronts[key] = tuple(front(stage, structure, reserved))
        found[structure] = Group(tuple(whose), fronts[key], has_ends)
    return list(found.values())


def _own_load(stage: Stage, group: Group) -> list[float]:
    """Seconds of each of its own backward windows that a layer with the fewest bytes uses."""
    layer = stage.layers[group.numbers[0]]
    load = [0.0] * len(layer.backward_windows)
    for operator, (kind, w) in zip(layer.operators, group.front[0].policy, strict=True):
        if kind == "own":
            load[w] += operator.seconds
    return load


def one_each(group: Group, allowed: Sequence[int]) -> Choices:
    """All layers take one policy."""
    n = len(group.numbers)
    return _choices(
        np.array([n * group.front[p].bytes for p in allowed], dtype=float),
        np.array([n * group.front[p].seconds + group.has_ends * group.front[p].ends for p in allowed]),
        [(((p, n),),) for p in allowed],
    )


def mixed(group: Group, allowed: Sequence[int]) -> Choices:
    """j layers take a policy of the hull, one takes any, and the rest the hull's next."""
    n = len(group.numbers)
    each_bytes = np.array([float(group.front[p].bytes) for p in allowed])
    each_seconds = np.array([group.front[p].seconds for p in allowed])
    hull = _hull(each_bytes, each_seconds)
    pairs = list(pairwise(hull)) or [(hull[0], hull[0])]
    p, q = np.array(pairs).T
    j = np.arange(n)
    totals = []
    for value in (each_bytes, each_seconds):
        two = j[None, :] * value[p][:, None] + (n - 1 - j)[None, :] * value[q][:, None]
        totals.append((two[:, :, None] + value).ravel())
    shape = (len(pairs), n, len(allowed))

    def counts(at: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        pair, first, other = (int(each) for each in np.unravel_index(at, shape))
        named = ((pairs[pair][0], first), (other, 1), (pairs[pair][1], n - 1 - first))
        return (tuple((allowed[which], count) for which, count in named if count),)

    return _choices(totals[0], totals[1], counts)


def _hull(size: np.ndarray, seconds: np.ndarray) -> list[int]:
    """Places of the lower convex hull, by rising bytes."""
    found: list[int] = []
    for c in map(int, np.lexsort((seconds, size))):
        if found and seconds[c] >= seconds[found[-1]]:
            continue
        while len(found) > 1:
            a, b = found[-2:]
            if (seconds[b] - seconds[a]) * (size[c] - size[a]) < (seconds[c] - seconds[a]) * (size[b] - size[a]):
                break
            found.pop()
        found.append(c)
    return found


def _choices(
    size: np.ndarray,
    seconds: np.ndarray,
    counts: Sequence[tuple[tuple[tuple[int, int], ...], ...]]
    | Callable[[int], tuple[tuple[tuple[int, int], ...], ...]],
) -> Choices:
    """Those that none beats, thinned out where they are many."""
    order = np.lexsort((seconds, size))
    best = np.minimum.accumulate(seconds[order])
    order = order[np.concatenate([[True], best[1:] < best[:-1]])]
    if len(order) > _MOST_CHOICES:
        order = order[np.linspace(0, len(order) - 1, _MOST_CHOICES).round().astype(int)]
    of = counts if callable(counts) else counts.__getitem__
    return Choices(size[order], seconds[order], [of(int(at)) for at in order])


def _together(first: Choices, second: Choices) -> Choices:
    size = (first.bytes[:, None] + second.bytes).ravel()
    seconds = (first.seconds[:, None] + second.seconds).ravel()
    width = len(second.counts)
    return _choices(size, seconds, lambda at: first.counts[at // width] + second.counts[at % width])


def candidates(
    stage: Stage, parts: Sequence[Group], ways: Callable[[Group, Sequence[int]], Choices]
) -> list[tuple[int, Choices]]:
    """For several bounds on transient bytes: the bound, and the choices whose policies keep it."""
    least = max(min(p.transient for p in group.front) for group in parts)
    levels = sorted({p.transient for group in parts for p in group.front if p.transient >= least})
    if len(levels) > _LEVELS:
        levels = [levels[round(n * (len(levels) - 1) / (_LEVELS - 1))] for n in range(_LEVELS)]
    found = []
    for level in levels:
        total: Choices | None = None
        for group in parts:
            more = ways(group, [n for n, p in enumerate(group.front) if p.transient <= level])
            total = more if total is None else _together(total, more)
        assert total is not None
        found.append((level, total))
    return found


@dataclass(frozen=True)
class Found:
    """The best plan that fits, or else the one with the lowest peak."""

    assignment: Assignment
    outcome: Outcome


def choose(
    stage: Stage,
    parts: Sequence[Group],
    ways: Callable[[Group, Sequence[int]], Choices],
    best: Found | None = None,
) -> Found:
    """The best choice by `evaluate`, no worse than `best`; where none fits, the one that needs least."""
    for level, choices in candidates(stage, parts, ways):
        # What an estimate is off by is put right from the outcome, a few times.
        room = float(stage.budget - stage.static - level)
        tried: set[int] = set()
        for _ in range(_TRIES):
            at = max(0, int(np.searchsorted(choices.bytes, room, side="right")) - 1)
            if at in tried:
                break
            tried.add(at)
            found = min(
                (_placed(stage, parts, choices.counts[at], order) for order in (1, -1)), key=lambda f: _rank(stage, f)
            )
            if best is None or _rank(stage, found) < _rank(stage, best):
                best = found
            room = choices.bytes[at] + stage.budget - found.outcome.peak
        if best is not None and _rank(stage, best)[0] == 0.0:
            break
    assert best is not None
    return best


def _rank(stage: Stage, found: Found) -> tuple[float, float]:
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
    assignment = expand(stage, policies)
    return Found(assignment, evaluate(stage, assignment))


def solve_mixed(stage: Stage) -> Solution:
    """HEU-MIX: no worse than HEU. Raises `InfeasibleError` where it finds nothing that fits."""
    start = time.perf_counter()
    assignment = all_kept(stage)
    if (outcome := evaluate(stage, assignment)).peak > stage.budget:
        fronts: Fronts = {}
        found = choose(stage, groups(stage, fronts, last_apart=False), one_each)
        if found.outcome.exposed > 0.0 or found.outcome.peak > stage.budget:
            found = choose(stage, groups(stage, fronts, last_apart=True), mixed, found)
        starts = [found.assignment]
        if found.outcome.peak > stage.budget:
            starts.append(all_on_demand(stage))
        drafts = [Draft(stage, list(each)) for each in starts]
        for draft in drafts:
            shrink(draft)
            if draft.peak <= stage.budget:
                improve(draft, tries=_MOVES)
        judged = [Found(draft.assignment, evaluate(stage, draft.assignment)) for draft in drafts]
        best = min(judged, key=lambda each: _rank(stage, each))
        assignment, outcome = best.assignment, best.outcome
        if outcome.peak > stage.budget:
            raise InfeasibleError(outcome.peak, stage.budget, is_exact=False)
    return Solution(
        assignment=assignment,
        solver="heu-mix",
        outcome=outcome,
        search_seconds=time.perf_counter() - start,
    )
