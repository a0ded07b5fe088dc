"""The judge of every solver: by hand, and against a walk through the unit that knows nothing of it."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest

from wastenot.parallel.lynx.evaluate import evaluate, violations
from wastenot.parallel.lynx.extremes import all_kept, all_on_demand
from wastenot.parallel.lynx.problem import Assignment, Backward, Layer, Operator, Source, Stage, Window


def random_layer(chance: random.Random, name: str, num_operators: int, num_windows: int) -> Layer:
    """Any graph, any order of backward operators; whole seconds and bytes, some of them 0."""
    operators: list[Operator] = []
    for i in range(num_operators):
        kind = "compute"
        if i == 0 and chance.random() < 0.8:
            kind = "input"
        elif chance.random() < 0.12:
            kind = "collective"
        operators.append(
            Operator(
                name=f"o{i}",
                seconds=float(chance.choice([0, *range(1, 10)])),
                bytes=chance.choice([0, *range(1, 21)]),
                inputs=tuple(o.name for o in operators if chance.random() < 0.5),
                kind=kind,
            )
        )
    windows = [
        Window(name=f"w{n}", seconds=float(chance.randint(1, 12)), speed=chance.choice((0.5, 0.75, 1.0)))
        for n in range(num_windows)
    ]
    num_forward = chance.randint(0, num_windows)
    backward: list[Backward | Window] = [
        Backward(name=f"b{n}", seconds=1.0, reads=tuple(o.name for o in operators if chance.random() < 0.4))
        for n in range(chance.randint(1, 4))
    ]
    for window in windows[num_forward:]:
        backward.insert(chance.randint(0, len(backward)), window)
    return Layer(
        name=name,
        operators=tuple(operators),
        forward=tuple(windows[:num_forward]),
        backward=tuple(backward),
    )


def random_stage(chance: random.Random, layers: tuple[Layer, ...]) -> Stage:
    """With any micro-batches in flight, and a budget that everything fits in."""
    stalls = (Window(name="stall", seconds=float(chance.randint(1, 6))),) if chance.random() < 0.25 else ()
    return Stage(
        layers=layers,
        in_flight=chance.choice((1, 2, 3)),
        budget=1 << 40,
        static=chance.randint(0, 5),
        stalls=stalls,
        replay=chance.random() < 0.3,
    )


def walk(stage: Stage, assignment: Assignment) -> tuple[float, int] | None:
    """Seconds exposed and bytes at most; None where something is missing when it is read.

    Event by event: windows compute what is theirs, backward operators first compute what they read on demand.
    """
    times: dict[tuple[int, int], int] = {}
    uses: dict[tuple[int, int], int] = {}
    load: dict[int, float] = defaultdict(float)
    exposed = 0.0

    def compute(number: int, i: int, at: int) -> bool:
        layer, sources = stage.layers[number], assignment[number]
        for j in layer.inputs[i]:
            if sources[j] == "keep":
                continue
            if (number, j) not in times:
                may = sources[i] == "demand" and sources[j] == "demand"
                if not may or not compute(number, j, at):
                    return False
            elif sources[j] == "demand" and sources[i] != "demand":
                return False
            uses[number, j] = at
        if layer.operators[i].kind == "input" or (
            layer.operators[i].kind == "collective" and (sources[i] != "demand" or not stage.replay)
        ):
            return False
        times[number, i] = uses[number, i] = at
        return True

    for at, event in enumerate(stage.events):
        if isinstance(event.what, Window):
            for number, sources in enumerate(assignment):
                for i, source in enumerate(sources):
                    if source == at and type(source) is int:
                        if not compute(number, i, at):
                            return None
                        load[at] += stage.layers[number].operators[i].seconds
            continue
        for name in event.what.reads:
            me = (event.layer, stage.layers[event.layer].index[name])
            source = assignment[me[0]][me[1]]
            if source == "keep":
                continue
            if me not in times and (source != "demand" or not compute(*me, at)):
                return None
            uses[me] = at
    for (number, i), _ in times.items():
        if assignment[number][i] == "demand":
            exposed += stage.layers[number].operators[i].seconds
    for at, seconds in load.items():
        window = stage.events[at].window
        assert window is not None
        exposed += max(0.0, seconds - window.seconds * window.speed)
    kept = sum(
        operator.bytes
        for layer, sources in zip(stage.layers, assignment, strict=True)
        for operator, source in zip(layer.operators, sources, strict=True)
        if source == "keep"
    )
    most = max(
        sum(stage.layers[n].operators[i].bytes for (n, i), came in times.items() if came <= at <= uses[n, i])
        for at in range(len(stage.events))
    )
    return exposed, stage.static + stage.in_flight * kept + most


def _random_assignment(chance: random.Random, stage: Stage) -> Assignment:
    windows = [at for at, event in enumerate(stage.events) if event.window is not None]
    found = []
    for layer in stage.layers:
        sources: list[Source] = []
        for operator in layer.operators:
            options: list[Source] = ["keep", "demand", "none", *windows[:3], *windows[-3:]]
            sources.append("keep" if operator.kind == "input" else chance.choice(options))
        found.append(tuple(sources))
    return tuple(found)


def _is_tidy(stage: Stage, assignment: Assignment) -> bool:
    """Whether somebody reads all that is computed again."""
    for layer, sources in zip(stage.layers, assignment, strict=True):
        again = [source not in ("keep", "none") for source in sources]
        for i, is_again in enumerate(again):
            if is_again and not layer.is_needed[i] and not any(again[c] for c in layer.readers[i]):
                return False
    return True


@pytest.mark.parametrize("seed", range(60))
def test_judgement_is_that_of_a_walk_through_the_unit(seed: int) -> None:
    chance = random.Random(seed)
    layers = tuple(random_layer(chance, f"l{n}", chance.randint(1, 4), chance.randint(0, 3)) for n in range(2))
    stage = random_stage(chance, layers)
    for assignment in filter(
        lambda each: _is_tidy(stage, each), (_random_assignment(chance, stage) for _ in range(100))
    ):
        found = walk(stage, assignment)
        assert (found is None) == bool(violations(stage, assignment))
        if found is not None:
            outcome = evaluate(stage, assignment)
            assert found == (pytest.approx(outcome.exposed), outcome.peak)


LAYER = Layer(
    name="layer",
    operators=(
        Operator(name="input", seconds=0.0, bytes=1, kind="input"),
        Operator(name="a", seconds=2.0, bytes=10, inputs=("input",)),
        Operator(name="t", seconds=1.0, bytes=100, inputs=("a",)),
        Operator(name="b", seconds=4.0, bytes=20, inputs=("t",)),
    ),
    forward=(Window(name="f", seconds=3.0),),
    backward=(
        Window(name="w", seconds=8.0, speed=0.5),
        Backward(name="b'", seconds=5.0, reads=("b",)),
        Backward(name="a'", seconds=5.0, reads=("a", "input")),
    ),
)
# Events: 0, 1 forward windows; 2, 3, 4 of layer 1's backward; 5, 6, 7 of layer 0's.
STAGE = Stage(layers=(LAYER, LAYER), in_flight=3, budget=1000, static=7)


def test_keeping_costs_bytes_for_every_micro_batch_and_no_time() -> None:
    outcome = evaluate(STAGE, all_kept(STAGE))
    assert (outcome.exposed, outcome.hidden) == (0.0, 0.0)
    assert outcome.peak == 7 + 3 * 2 * (1 + 10 + 20)


def test_on_demand_costs_all_the_time_and_the_bytes_of_one_layer() -> None:
    outcome = evaluate(STAGE, all_on_demand(STAGE))
    assert outcome.exposed == 2 * (2 + 1 + 4)
    assert outcome.peak == 7 + 3 * 2 * 1 + (10 + 100 + 20)
    assert outcome.peak_at == 3


def test_forward_windows_fill_memory_for_all_layers() -> None:
    assignment: Assignment = (("keep", 0, "none", "keep"), ("keep", 1, "none", "keep"))
    outcome = evaluate(STAGE, assignment)
    assert (outcome.exposed, outcome.hidden) == (0.0, 4.0)
    assert outcome.peak == 7 + 3 * 2 * (1 + 20) + 2 * 10


def test_what_spills_over_a_window_is_exposed() -> None:
    # Room for 8 * 0.5 seconds, and 2 + 1 + 4 to do.
    outcome = evaluate(STAGE, (("keep", 2, 2, 2), ("keep", "keep", "none", "keep")))
    assert (outcome.exposed, outcome.hidden) == (3.0, 4.0)
    assert outcome.spilled == {2: 3.0}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("keep", "keep", "none", "none"), "nobody has it"),
        (("demand", "keep", "none", "keep"), "always kept"),
        (("keep", 6, "none", "keep"), "no window"),
        (("keep", "keep", "none", "demand"), "t is not there"),
        (("keep", "demand", 2, "demand"), "a is not there"),
        (("keep", "keep", 5, 2), "t is not there"),
    ],
)
def test_each_rule_is_enforced(sources: tuple[Source, ...], message: str) -> None:
    found = violations(STAGE, (sources, ("keep", "keep", "none", "keep")))
    assert found and all(message in line for line in found)


def test_a_window_after_the_use_serves_nobody() -> None:
    found = violations(STAGE, (("keep", "keep", "none", "keep"), ("keep", 5, "none", "keep")))
    assert found == ["layer 1, a: window 5 comes after its use"]


def test_one_micro_batch_in_flight_has_no_use_for_forward_windows() -> None:
    assert [event.backward for event in replace(STAGE, in_flight=1).events] == [True] * 6


def test_peak_over_the_budget_is_said_with_both() -> None:
    assert violations(replace(STAGE, budget=100), all_kept(STAGE)) == ["memory: 193 bytes at most, the budget is 100"]
