"""From measured layers to a stage, and from its assignment to the names that a run knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from wastenot.launch.config import TrainConfig
from wastenot.launch.planner_input import from_config
from wastenot.launch.recompute_loop import drift
from wastenot.launch.recompute_planner import Measurement, Plan, Planner
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.config import ParallelConfig, RecomputeConfig
from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.evaluate import evaluate
from wastenot.parallel.lynx.extremes import all_on_demand
from wastenot.parallel.lynx.measured import Measured, by_name, droppable, with_measured
from wastenot.parallel.lynx.problem import Stage
from wastenot.parallel.lynx.question import Question
from wastenot.parallel.lynx.solve import solve
from wastenot.parallel.lynx.stages import Costs
from wastenot.parallel.mesh import single
from wastenot.parallel.meter import Meter
from wastenot.parallel.recomputation import Schedule

MIB = 2**20
MODEL = ModelConfig(vocab_size=64, d_model=32, layers=3, heads=2, moe=MoEConfig(experts=4, d_expert=32))


def config_of(parallel: ParallelConfig, **recompute: object) -> TrainConfig:
    base = TrainConfig(model=MODEL, router=RouterConfig(top_k=2), parallel=parallel)
    options = RecomputeConfig(mode="lynx", **recompute)  # pyright: ignore[reportArgumentType]
    return replace(base, recompute=options, train=replace(base.train, batch=4), data=replace(base.data, seq_len=32))


def stage_of(parallel: ParallelConfig, budget: int) -> Stage:
    given = from_config(config_of(parallel), ranks=2)
    question = Question(
        shape=given.shape, layout=given.layout, cluster=read_cluster("cpu-gloo"), budget=budget, fill_stalls=False
    )
    [stage] = Costs(question).stages(0).stages
    return stage


@pytest.fixture
def stage() -> Stage:
    """Experts over two ranks."""
    return stage_of(ParallelConfig(expert=2), 4096 * MIB)


@pytest.fixture
def measured(stage: Stage) -> Measured:
    """Everything takes a millisecond and a MiB, windows last 2.5 ms."""
    names = droppable(stage.layers[0], 1)
    windows = [*stage.layers[0].forward, *stage.layers[0].backward_windows]
    return Measured(
        seconds=dict.fromkeys(names, 1e-3),
        bytes=dict.fromkeys(names, MIB),
        windows={each.name: 2.5e-3 for each in windows},
    )


def test_what_other_ranks_sent_is_never_computed_again(stage):
    alone, shared = droppable(stage.layers[0], 1), droppable(stage.layers[0], 2)
    assert {"query and key", "expert up", "permute"} <= set(alone)
    assert set(alone) - set(shared) == {"query and key", "value"}
    assert not {"router", "routing", "input", "dispatch", "combine"} & set(alone)


def test_measured_figures_replace_modelled_ones(stage, measured):
    layer = with_measured(stage.layers[0], measured)
    for operator in layer.operators:
        if operator.name in measured.bytes:
            assert (operator.seconds, operator.bytes, operator.kind) == (1e-3, MIB, "compute")
        else:
            assert operator.kind in ("input", "collective")
    assert {each.seconds for each in (*layer.forward, *layer.backward_windows)} == {2.5e-3}
    assert [each.name for each in layer.operators] == [each.name for each in stage.layers[0].operators]


@pytest.mark.parametrize("solver", ["heu-mix", "heu", "greedy", "opt"])
def test_an_assignment_by_name_says_the_same(stage, measured, solver):
    layers = tuple(with_measured(layer, measured) for layer in stage.layers)
    roomy = replace(stage, layers=layers)
    nothing, everything = (solve(roomy, which).outcome.peak for which in ("none", "full"))
    tight = replace(roomy, budget=(nothing + everything) // 2)
    solution = solve(tight, solver)
    named = by_name(tight, solution.assignment, (4, 5, 6))
    # Schedule refuses what is computed again and was not dropped.
    Schedule(frozenset(named.dropped), named.windows)
    placed = {name: window for window, names in named.windows.items() for name in names}
    for place, sources in enumerate(solution.assignment):
        for operator, source in zip(tight.layers[place].operators, sources, strict=True):
            name = f"{4 + place}.{operator.name}"
            assert (name in named.dropped) == (source != "keep" and operator.kind == "compute")
            if isinstance(source, int):
                event = tight.events[source]
                assert placed.pop(name) == f"{4 + event.layer}.{event.what.name}"
    assert not placed
    for names in named.windows.values():
        order = [(-int(name.partition(".")[0]), tight.layers[0].index[name.partition(".")[2]]) for name in names]
        assert order == sorted(order)


def planner(**recompute: object) -> Planner:
    config = config_of(ParallelConfig(), **recompute)
    model = build_decoder(config.model, config.router, single(), recompute=config.recompute)
    return Planner(config, single(), model)


def measurement_of(planner: Planner) -> Measurement:
    """One step's worth: every operator a millisecond and a MiB."""
    meter = Meter(torch.device("cpu"))
    for name in sorted(planner.everything_dropped().dropped):
        meter.computed(name, 1e-3)
        meter.dropped(name, MIB)
    return planner.measured(meter, [0.5], 0.1)


def test_meter_and_planner_agree_on_names_and_means():
    found = measurement_of(planner())
    assert (found.step_seconds, found.recompute_seconds) == (0.5, 0.1)
    [measured] = found.kinds.values()
    assert set(measured.seconds.values()) == {1e-3} and set(measured.bytes.values()) == {MIB}


def test_a_plan_is_what_its_assignment_comes_to():
    made = planner()
    measurement = measurement_of(made)
    most = made.plan(measurement, solver="none")
    [(roomy, _)] = made.measured_stages(measurement, most.peak_bytes)
    least = evaluate(roomy, all_on_demand(roomy))
    assert least.peak < most.peak_bytes and least.exposed > most.exposed_seconds == 0.0
    budget = (least.peak + most.peak_bytes) // 2
    plan = made.plan(measurement, budget=budget)
    [(stage, numbers)] = made.measured_stages(measurement, budget)
    assert numbers == (0, 1, 2)
    assert plan.peak_bytes <= budget and 0 < plan.exposed_seconds < least.exposed
    assert plan.step_seconds == pytest.approx(0.4 + plan.exposed_seconds)
    assert plan.exposed_seconds <= evaluate(stage, solve(stage, "heu-mix").assignment).exposed + 1e-12
    assert made.plan(measurement, most.peak_bytes - budget, budget=most.peak_bytes).peak_bytes <= budget
    assert Plan.from_plain(plan.to_plain()) == plan


def test_a_budget_of_a_run_is_its_own():
    assert planner(budget=123 * MIB).budget == 123 * MIB
    assert planner().budget > 123 * MIB


def test_drift_is_the_part_of_choices_that_moved():
    before = torch.tensor([[8, 0], [4, 4]])
    assert drift(before, 3 * before) == 0.0
    assert drift(before, torch.tensor([[0, 8], [4, 4]])) == pytest.approx(0.5)
    assert drift(before, torch.tensor([[6, 2], [5, 3]])) == pytest.approx((0.25 + 0.125) / 2)
