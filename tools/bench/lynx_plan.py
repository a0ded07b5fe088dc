"""Benchmark `lynx-plan`: what each planner exposes, how long it searches, and how far it is from the best known.

Every solver gets the same stage: the first rank of a pipeline, which has the most micro-batches in flight, at budgets
from the smallest that fits to the one that keeps everything. Times are the cost model's, but for those of the search.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...parallel.lynx.cluster import read_cluster
from ...parallel.lynx.evaluate import violations
from ...parallel.lynx.gpt_profile import gpt_layer
from ...parallel.lynx.layout import Layout
from ...parallel.lynx.problem import Stage
from ...parallel.lynx.question import Question
from ...parallel.lynx.solution import InfeasibleError, Solution
from ...parallel.lynx.solve import solve
from ...parallel.lynx.stages import Costs
from ..lynx_input import read_model
from .report import Goal, Report, Row, at_most, environment

SOLVERS = ("none", "full", "selective", "greedy", "heu", "heu-mix", "opt", "checkmate")
HEU_S, MIX_S, OPT_S = 0.16, 0.5, 60.0
"""Most seconds of a search: the paper's average for HEU, and two of ours."""
WITHIN = 1.01
"""HEU-MIX's unit, in units of OPT's."""
OPT_GAP = 0.01
PARTS, QUICK_PARTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0), (0.1, 0.5)
"""Places of the budget between the smallest that fits and what keeps everything."""
QUICK_OPT_S = 10.0

HEADINGS = {
    "case": "case",
    "budget_gib": "budget, GiB",
    "solver": "solver",
    "unit_ms": "unit, ms",
    "exposed_ms": "exposed, ms",
    "faster_than_full": "x full",
    "over_opt": "unit / OPT's",
    "search_s": "search, s",
    "gap": "gap",
    "why_not": "why not",
}
NOTES = (
    "unit: forward and backward of one micro-batch over the stage's layers, with exposed recomputation and "
    "communication",
    "x full: how many times as fast as with Megatron's full recomputation",
    "gap: part of the exposed seconds that may be too much, by the solver's own bound; it is large for nothing where "
    "almost nothing is exposed, so the goal is of the same difference as a part of the unit",
)


@dataclass(frozen=True)
class Case:
    """A model, laid out; or 24 layers of a published profile, four micro-batches in flight."""

    name: str
    model: str = ""
    layout: Layout = field(default_factory=Layout)


CASES = (
    Case("24 GPT layers, published profile"),
    Case("Mixtral-8x7B, PP4 EP8", "mixtral-8x7b", Layout(expert=8, pipeline=4, data=16, micro_batches=16, zero=1)),
    Case(
        "Mixtral-8x7B, TP4 PP4 EP8",
        "mixtral-8x7b",
        Layout(tensor=4, sequence_parallel=True, expert=8, pipeline=4, data=4, micro_batches=16, zero=1),
    ),
    Case("Qwen3-30B-A3B, PP2 EP16", "qwen3-30b-a3b", Layout(expert=16, pipeline=2, data=16, micro_batches=8, zero=1)),
    Case(
        "DeepSeek-V3, PP16 EP64",
        "deepseek-v3",
        Layout(expert=64, pipeline=16, data=64, micro_batches=64, zero=1, merged_dispatch=True),
    ),
    Case(
        "GPT-22B, TP8 PP4",
        "gpt-22b",
        Layout(tensor=8, sequence_parallel=True, pipeline=4, data=2, micro_batches=16, seq_len=2048, zero=1),
    ),
)


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Every solver on every case and budget."""
    rows: list[Row] = []
    for case in CASES:
        stage = stage_of(case)
        least, most = span(stage)
        for part in QUICK_PARTS if quick else PARTS:
            budget = least + int(part * (most - least))
            say(f"{case.name}, {budget / 2**30:.1f} GiB")
            rows += rows_of(case.name, replace(stage, budget=budget), QUICK_OPT_S if quick else OPT_S)
            gc.collect()
    notes = [*NOTES]
    if quick:
        notes.append(f"quick: {len(QUICK_PARTS)} budgets of {len(PARTS)}; OPT and CHECKMATE have {QUICK_OPT_S:g} s")
    return Report(
        name="lynx-plan",
        command=command,
        env=environment(["scipy"]),
        rows=rows,
        goals=goals(rows),
        notes=notes,
        headings=HEADINGS,
    )


def stage_of(case: Case) -> Stage:
    """The first rank's."""
    if not case.model:
        return Stage(layers=(gpt_layer(),) * 24, in_flight=4, budget=1)
    given = read_model(case.model)
    cluster = read_cluster("h100-nvlink8-ib")
    question = Question(shape=given.shape, layout=case.layout, cluster=cluster, optimizer=given.optimizer)
    return Costs(question).stages(0).stages[0]


def span(stage: Stage) -> tuple[int, int]:
    """The smallest budget that fits, and the one that keeps everything."""
    try:
        solve(replace(stage, budget=1), "heu-mix", OPT_S)
    except InfeasibleError as error:
        least = error.smallest
    else:
        raise AssertionError("a byte is enough")
    return least, solve(replace(stage, budget=2**62), "none", OPT_S).outcome.peak


def rows_of(name: str, stage: Stage, limit_s: float) -> list[Row]:
    """One row per solver."""
    found: dict[str, Solution | str] = {}
    for solver in SOLVERS:
        try:
            solution = solve(stage, solver, limit_s)
        except InfeasibleError as error:
            found[solver] = f"needs {error.smallest / 2**30:.1f} GiB"
            continue
        # CHECKMATE computes tensors as often as it likes: that is no assignment of ours.
        if solver != "checkmate":
            broken = violations(replace(stage, replay=True), solution.assignment)
            assert not broken, (name, solver, broken)
        found[solver] = solution
    beside = sum(event.what.seconds for event in stage.events if event.backward) + sum(
        operator.seconds for layer in stage.layers for operator in layer.operators
    )
    units = {solver: beside + s.outcome.exposed for solver, s in found.items() if isinstance(s, Solution)}
    rows: list[Row] = []
    for solver, solution in found.items():
        row: dict[str, Any] = {"case": name, "budget_gib": stage.budget / 2**30, "solver": solver}
        if isinstance(solution, str):
            rows.append({**row, "why_not": solution})
            continue
        row |= {
            "unit_ms": 1e3 * units[solver],
            "exposed_ms": 1e3 * solution.outcome.exposed,
            "hidden_ms": 1e3 * solution.outcome.hidden,
            "faster_than_full": units["full"] / units[solver] if "full" in units else None,
            "over_opt": units[solver] / units["opt"] if "opt" in units else None,
            "search_s": solution.search_seconds,
            "gap": solution.gap,
            "unit_gap": None if solution.bound is None else (solution.outcome.exposed - solution.bound) / units[solver],
            "peak_bytes": int(solution.outcome.peak),
            "why_not": solution.note or None,
        }
        rows.append(row)
    return rows


def goals(rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """Per case: time of search, distance to OPT, and the order of METHODS section 2."""
    found: list[Goal] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]

        def most(solver: str, key: str, own: Sequence[Mapping[str, Any]] = own) -> float | None:
            values = [row[key] for row in own if row["solver"] == solver and row.get(key) is not None]
            return max(values, default=None)

        found.append(at_most(f"{case}: HEU's search, s", most("heu", "search_s"), HEU_S))
        found.append(at_most(f"{case}: HEU-MIX's search, s", most("heu-mix", "search_s"), MIX_S))
        found.append(at_most(f"{case}: HEU-MIX's unit / OPT's", most("heu-mix", "over_opt"), WITHIN))
        found.append(at_most(f"{case}: OPT's gap, as a part of the unit", most("opt", "unit_gap"), OPT_GAP))
        found.append(at_most(f"{case}: pairs of solvers out of order", float(out_of_order(own)), 0))
    return found


_ORDER = (("opt", "heu-mix"), ("heu-mix", "heu"), ("heu", "full"), ("opt", "greedy"), ("greedy", "full"))


def out_of_order(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many pairs of plans, of one budget, are the wrong way round by more than rounding."""
    wrong = 0
    for budget in dict.fromkeys(row["budget_gib"] for row in rows):
        units = {row["solver"]: row["unit_ms"] for row in rows if row["budget_gib"] == budget and "unit_ms" in row}
        wrong += sum(
            units[first] > units[second] * (1 + 1e-9) for first, second in _ORDER if first in units and second in units
        )
    return wrong
