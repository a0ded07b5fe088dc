"""OPT against all assignments there are, on stages small enough to try them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from test_lynx_evaluate import random_layer, random_stage, walk

from wastenot.parallel.lynx.evaluate import evaluate, violations
from wastenot.parallel.lynx.extremes import all_kept
from wastenot.parallel.lynx.opt import solve_exact
from wastenot.parallel.lynx.problem import Source, Stage
from wastenot.parallel.lynx.solution import InfeasibleError

NUM_INSTANCES = 300
_MOST = 4000


def small_stage(seed: int) -> Stage:
    """One layer of up to 5 operators and 3 windows, or two of up to 4 operators, equal or not."""
    chance = random.Random(seed)
    while True:
        if chance.random() < 0.5:
            layers = (random_layer(chance, "a", chance.randint(3, 5), chance.randint(0, 3)),)
        else:
            first = random_layer(chance, "a", chance.randint(2, 4), chance.randint(0, 3))
            other = random_layer(chance, "b", chance.randint(2, 3), chance.randint(0, 1))
            layers = (first, first if chance.random() < 0.5 else other)
        stage = random_stage(chance, layers)
        if np.prod([len(_of_layer(stage, number)) for number in range(len(layers))]) <= _MOST:
            return stage


def _of_layer(stage: Stage, number: int) -> list[tuple[Source, ...]]:
    """All sources of one layer with which the unit runs, the other layers being kept."""
    windows = [at for at, event in enumerate(stage.events) if event.window is not None]
    options: list[list[Source]] = [
        ["keep"] if operator.kind == "input" else ["keep", "demand", "none", *windows]
        for operator in stage.layers[number].operators
    ]
    kept = list(all_kept(stage))
    found = []
    for sources in itertools.product(*options):
        kept[number] = sources
        if walk(stage, tuple(kept)) is not None:
            found.append(sources)
    return found


def all_outcomes(stage: Stage) -> list[tuple[float, int]]:
    """Seconds exposed and bytes at most, of all assignments that run."""
    assignments = itertools.product(*(_of_layer(stage, number) for number in range(len(stage.layers))))
    return [outcome for each in assignments if (outcome := walk(stage, each)) is not None]


@pytest.mark.parametrize("first", range(0, NUM_INSTANCES, 10))
def test_opt_is_the_best_of_all_assignments(first: int) -> None:
    for seed in range(first, first + 10):
        stage = small_stage(seed)
        outcomes = all_outcomes(stage)
        peaks = sorted({peak for _, peak in outcomes})
        chance = random.Random(seed)
        for budget in {peaks[0] - 1, peaks[0], chance.choice(peaks), chance.choice(peaks)}:
            tight = replace(stage, budget=budget)
            best = min((exposed for exposed, peak in outcomes if peak <= budget), default=None)
            if best is None:
                with pytest.raises(InfeasibleError) as raised:
                    solve_exact(tight, gap=0.0)
                assert (raised.value.smallest, raised.value.is_exact) == (peaks[0], True), seed
                continue
            solution = solve_exact(tight, gap=0.0)
            assert violations(tight, solution.assignment) == [], seed
            assert solution.outcome == evaluate(tight, solution.assignment), seed
            assert solution.outcome.exposed == pytest.approx(best, abs=1e-9), seed
            assert solution.bound == pytest.approx(best, abs=1e-6), seed
