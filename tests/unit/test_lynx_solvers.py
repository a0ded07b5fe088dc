"""What METHODS section 2 says of all solvers, on random stages too large to try everything, and on real layers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_lynx_evaluate import LAYER, random_layer, random_stage

from wastenot.parallel.lynx.checkmate import solve_checkmate
from wastenot.parallel.lynx.evaluate import Part, evaluate, violations
from wastenot.parallel.lynx.evaluate import part as part_of
from wastenot.parallel.lynx.extremes import all_kept, all_on_demand
from wastenot.parallel.lynx.gpt_profile import gpt_layer
from wastenot.parallel.lynx.opt import solve_exact
from wastenot.parallel.lynx.partition import plain_seconds
from wastenot.parallel.lynx.peers import solve_checkmate_once, solve_selective
from wastenot.parallel.lynx.problem import Backward, Kind, Layer, Operator, Stage, Window
from wastenot.parallel.lynx.solution import InfeasibleError, Solution
from wastenot.parallel.lynx.solve import SOLVERS, solve
from wastenot.parallel.lynx.spare import keep_what_fits

FULL = os.environ.get("WASTENOT_GRID") == "full"
# Twice: no slower, where both found something that fits.
ORDER = [
    ("opt", "heu-mix"),
    ("heu-mix", "heu"),
    ("heu", "full"),
    ("opt", "greedy"),
    ("greedy", "full"),
    ("opt", "checkmate-once"),
]


def moe_layer(scale: float = 1.0) -> Layer:
    """16 operators; all-to-all and tensor-parallel windows, two of each in both passes, `scale` times as long."""

    def operator(name: str, ms: float, megabytes: int, *inputs: str, kind: Kind = "compute") -> Operator:
        return Operator(name=name, seconds=ms / 1e3, bytes=megabytes * 10**6, inputs=inputs, kind=kind)

    def backward(name: str, ms: float, *reads: str) -> Backward:
        return Backward(name=name, seconds=ms / 1e3, reads=reads)

    def window(name: str, ms: float, speed: float) -> Window:
        return Window(name=name, seconds=scale * ms / 1e3, speed=speed)

    return Layer(
        name="moe",
        operators=(
            operator("input", 0.0, 32, kind="input"),
            operator("norm 1", 0.06, 32, "input"),
            operator("query, key, value", 0.4, 40, "norm 1"),
            operator("rotary", 0.08, 40, "query, key, value"),
            operator("attention", 0.9, 34, "rotary"),
            operator("projection", 0.3, 0, "attention"),
            operator("reduce-scatter", 0.5, 32, "projection", kind="collective"),
            operator("residual 1", 0.05, 32, "reduce-scatter", "input"),
            operator("norm 2", 0.06, 32, "residual 1"),
            operator("router", 0.08, 2, "norm 2"),
            operator("permute", 0.1, 64, "norm 2", "router"),
            operator("dispatch", 1.5, 64, "permute", kind="collective"),
            operator("linear 1", 1.0, 112, "dispatch"),
            operator("activation", 0.15, 56, "linear 1"),
            operator("linear 2", 0.5, 64, "activation"),
            operator("combine", 1.5, 64, "linear 2", kind="collective"),
        ),
        forward=(
            window("all-gather", 0.4, 0.9),
            window("reduce-scatter", 0.5, 0.9),
            window("dispatch", 1.5, 0.85),
            window("combine", 1.5, 0.85),
        ),
        backward=(
            window("combine'", 1.5, 0.85),
            backward("linear 2", 1.0, "activation"),
            backward("activation", 0.2, "linear 1"),
            backward("linear 1", 2.0, "dispatch"),
            window("dispatch'", 1.5, 0.85),
            backward("permute", 0.1, "router"),
            backward("router", 0.1, "norm 2", "router"),
            backward("norm 2", 0.1, "residual 1"),
            window("all-gather'", 0.5, 0.9),
            backward("projection", 0.6, "attention"),
            backward("attention", 2.0, "attention", "rotary"),
            backward("rotary", 0.1),
            backward("query, key, value", 0.8, "norm 1"),
            window("reduce-scatter'", 0.4, 0.9),
            backward("norm 1", 0.1, "input"),
        ),
    )


def fast_links(layer: Layer, scale: float) -> Layer:
    """The same with windows `scale` times as long."""

    def scaled(window: Window) -> Window:
        return replace(window, seconds=scale * window.seconds)

    return replace(
        layer,
        forward=tuple(map(scaled, layer.forward)),
        backward=tuple(scaled(each) if isinstance(each, Window) else each for each in layer.backward),
    )


def random_layers(seed: int) -> Stage:
    """Up to 6 layers of one or two structures, of up to 8 operators and 5 windows."""
    chance = random.Random(seed)
    kinds = [random_layer(chance, f"k{n}", chance.randint(4, 8), chance.randint(0, 5)) for n in range(2)]
    first, other = kinds[0], chance.choice(kinds)
    many = chance.randint(1, 6)
    layers = tuple(chance.choice((first, other)) for _ in range(many))
    if chance.random() < 0.5:
        layers = (first,) * (many // 2) + (other,) * (many - many // 2)
    return random_stage(chance, layers)


def between(stage: Stage, part: float) -> Stage:
    """With a budget between what full recomputation (0) and keeping everything (1) need."""
    low = evaluate(stage, all_on_demand(replace(stage, replay=True))).peak
    high = evaluate(stage, all_kept(stage)).peak
    return replace(stage, budget=int(low + part * (high - low)))


def attempt(stage: Stage, solver: str, time_limit: float = 3.0) -> Solution | None:
    try:
        return solve(stage, solver, time_limit)
    except InfeasibleError as error:
        assert error.smallest > stage.budget
        return None


@settings(max_examples=150 if FULL else 12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32), st.floats(0.0, 0.9))
def test_all_solutions_are_valid_and_in_order(seed: int, part: float) -> None:
    stage = between(random_layers(seed), part)
    found = {solver: attempt(stage, solver) for solver in SOLVERS if solver != "checkmate"}
    for solver, solution in found.items():
        if solution is not None:
            judge = replace(stage, replay=True) if solver == "full" else stage
            assert violations(judge, solution.assignment) == []
            assert solution.outcome == evaluate(judge, solution.assignment)
            assert solution.solver == solver
    for better, worse in ORDER:
        first, second = found[better], found[worse]
        if first is not None and second is not None:
            assert first.outcome.exposed <= second.outcome.exposed + 1e-9, (better, worse)
    if found["opt"] is None:
        # Full recomputation replays collectives, be that allowed or not.
        assert all(solution is None for solver, solution in found.items() if solver != "full" or stage.replay)


@settings(max_examples=100 if FULL else 10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32))
def test_opt_exposes_no_more_with_a_larger_budget(seed: int) -> None:
    stage, exposed = random_layers(seed), float("inf")
    for part in (0.1, 0.3, 0.6, 1.0):
        solution = attempt(between(stage, part), "opt")
        if solution is not None:
            assert solution.bound is not None and solution.bound <= exposed + 1e-9
            exposed = solution.outcome.exposed
    assert exposed == 0.0


@settings(max_examples=60 if FULL else 6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32), st.floats(0.0, 0.5))
def test_checkmate_gains_by_recomputing_twice_and_never_loses(seed: int, part: float) -> None:
    stage = between(random_layers(seed), part)
    try:
        once = solve_checkmate_once(stage, time_limit=3.0)
    except InfeasibleError:
        return
    many = solve_checkmate(stage, time_limit=6.0)
    assert many.outcome.exposed <= once.outcome.exposed + 1e-9
    assert many.outcome.peak <= stage.budget
    if "computed" not in many.note:
        assert violations(stage, many.assignment) == []


def test_checkmate_may_compute_a_tensor_twice() -> None:
    # Both ends of the backward read `a`; between them there is no room for it beside `c`.
    layer = Layer(
        name="layer",
        operators=(
            Operator(name="input", seconds=0.0, bytes=1, kind="input"),
            Operator(name="a", seconds=1.0, bytes=10, inputs=("input",)),
            Operator(name="c", seconds=100.0, bytes=10, inputs=("input",)),
        ),
        backward=(
            Backward(name="first", seconds=1.0, reads=("a",)),
            Backward(name="middle", seconds=1.0, reads=("c",)),
            Backward(name="last", seconds=1.0, reads=("a",)),
        ),
    )
    stage = Stage(layers=(layer,), in_flight=1, budget=11)
    with pytest.raises(InfeasibleError):
        solve_checkmate_once(stage)
    solution = solve_checkmate(stage)
    assert solution.outcome.exposed == 102.0
    assert solution.note == "computed more than once: 1"


REAL = {
    "gpt": gpt_layer(),
    "gpt, fast links": fast_links(gpt_layer(), 0.3),
    "moe": moe_layer(),
    "moe, fast links": moe_layer(0.2),
}


@pytest.mark.parametrize("layer", REAL)
@pytest.mark.parametrize("in_flight", [1, 4])
def test_heuristics_on_real_layers_are_valid_and_ordered(layer: str, in_flight: int) -> None:
    stage = Stage(layers=(REAL[layer],) * 24, in_flight=in_flight, budget=1)
    exposed = dict.fromkeys(("heu", "heu-mix"), float("inf"))
    # Single moves and the estimates before them are not quite monotonic in the budget.
    slack = 1e-3 * sum(map(plain_seconds, stage.layers))
    for part in (0.25, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0) if FULL else (0.3, 0.5, 1.0):
        tight = between(stage, part)
        found = {solver: attempt(tight, solver) for solver in ("heu", "heu-mix", "greedy", "full")}
        assert found["heu-mix"] is not None and found["full"] is not None
        if part == 0.5:
            checkmate = attempt(tight, "checkmate-once")
            assert checkmate is not None and found["heu-mix"].outcome.exposed <= checkmate.outcome.exposed
        for solver, solution in found.items():
            assert solution is None or solver == "full" or violations(tight, solution.assignment) == []
        for better, worse in ORDER:
            if (first := found.get(better)) and (second := found.get(worse)):
                assert first.outcome.exposed <= second.outcome.exposed
        for solver in exposed:
            if (solution := found[solver]) is not None:
                assert solution.outcome.exposed <= exposed[solver] + slack
                exposed[solver] = solution.outcome.exposed
    assert exposed["heu-mix"] == 0.0


def test_solvers_take_different_structures_together() -> None:
    stage = between(Stage(layers=(gpt_layer(),) * 3 + (moe_layer(0.2),) * 9, in_flight=3, budget=1), 0.4)
    for solver in ("heu", "heu-mix", "greedy"):
        solution = solve(stage, solver)
        assert violations(stage, solution.assignment) == []
    alternating = between(Stage(layers=(gpt_layer(), moe_layer(0.2)) * 6, in_flight=3, budget=1), 0.4)
    assert solve(alternating, "heu-mix").outcome.exposed <= solve(alternating, "heu").outcome.exposed


@pytest.mark.parametrize("solver", ["heu", "heu-mix"])
def test_search_grows_no_faster_than_the_layers_do(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = 0

    def counted(*given: Any) -> Part:
        nonlocal weighed
        weighed += 1
        return part_of(*given)

    monkeypatch.setattr("wastenot.parallel.lynx.draft.part", counted)
    monkeypatch.setattr("wastenot.parallel.lynx.evaluate.part", counted)
    counts = []
    for many in (24, 96):
        weighed = 0
        solve(between(Stage(layers=(moe_layer(0.2),) * many, in_flight=4, budget=1), 0.4), solver)
        counts.append(weighed)
    assert counts[0] >= 24 and counts[1] <= 4.5 * counts[0]


def test_replayed_collectives_make_room_where_that_is_allowed() -> None:
    stage = Stage(layers=(moe_layer(),) * 4, in_flight=4, budget=0)
    with pytest.raises(InfeasibleError) as kept:
        solve(stage, "heu-mix")
    with pytest.raises(InfeasibleError) as replayed:
        solve(replace(stage, replay=True), "heu-mix")
    assert replayed.value.smallest < kept.value.smallest
    tight = replace(stage, replay=True, budget=(kept.value.smallest + replayed.value.smallest) // 2)
    solution = solve(tight, "heu-mix")
    assert violations(tight, solution.assignment) == []
    collectives = [i for i, operator in enumerate(moe_layer().operators) if operator.kind == "collective"]
    assert any(sources[i] == "demand" for sources in solution.assignment for i in collectives)


def test_selective_recomputes_what_it_is_told() -> None:
    stage = between(Stage(layers=(gpt_layer(),) * 2, in_flight=2, budget=1), 1.0)
    names = [operator.name for operator in gpt_layer().operators]
    again = [
        name for name, source in zip(names, solve_selective(stage).assignment[0], strict=True) if source == "demand"
    ]
    assert again == ["softmax", "attention dropout", "attention"]
    assert "no operator" in solve_selective(stage, core=("nothing",)).note


def test_an_exact_error_says_the_smallest_budget() -> None:
    stage = Stage(layers=(LAYER, LAYER), in_flight=3, budget=0, static=7)
    with pytest.raises(InfeasibleError, match="budget: 0 bytes are too few; the smallest that fits is") as raised:
        solve_exact(stage)
    smallest = raised.value.smallest
    assert solve_exact(replace(stage, budget=smallest)).outcome.peak == smallest
    with pytest.raises(InfeasibleError):
        solve_exact(replace(stage, budget=smallest - 1))


@pytest.mark.parametrize("part", (0.2, 0.5, 0.8))
@pytest.mark.parametrize("seed", range(12))
def test_keeping_what_fits_exposes_nothing_more(seed: int, part: float) -> None:
    stage = between(random_layers(seed), part)
    solution = attempt(stage, "heu-mix")
    if solution is None:
        return
    kept = keep_what_fits(stage, solution.assignment)
    assert not violations(stage, kept)
    before, after = solution.outcome, evaluate(stage, kept)
    assert after.exposed <= before.exposed + 1e-9
    assert after.hidden + after.exposed <= before.hidden + before.exposed + 1e-9


def test_what_is_hidden_is_kept_where_it_fits() -> None:
    stage = Stage(layers=(moe_layer(5.0),) * 4, in_flight=1, budget=0)
    most, least = (evaluate(stage, each(stage)).peak for each in (all_kept, all_on_demand))
    found = []
    for budget in (least + (most - least) // 3, least + 2 * (most - least) // 3, most - 1):
        tight = replace(stage, budget=budget)
        solution = solve(tight, "heu-mix")
        assert solution.outcome.exposed == 0.0
        found.append(evaluate(tight, keep_what_fits(tight, solution.assignment)).hidden)
        assert found[-1] < solution.outcome.hidden
    assert found[0] > found[1] > found[2] > 0.0
    everything = replace(stage, budget=most)
    assert keep_what_fits(everything, all_on_demand(everything)) == all_kept(everything)


def test_unknown_solver_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'gurobi' is unknown; use one of heu-mix, heu, opt"):
        solve(Stage(layers=(LAYER,), in_flight=1, budget=1000), "gurobi")


def test_solvers_need_no_torch() -> None:
    code = (
        "import sys, wastenot.parallel.lynx.solve, wastenot.parallel.lynx.partition; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
