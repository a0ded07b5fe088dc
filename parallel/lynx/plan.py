"""A plan as a file: what every rank keeps, recomputes under which window, and recomputes on demand.

Policies are written once and named; layers that share one name it. A window is named from the layer whose output is
recomputed there: `forward dispatch` is that layer's own forward window (of a later micro-batch), `backward combine
gradient` its own backward one, `backward combine gradient +1` that of the layer after it, whose backward comes before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .assess import Answer
from .plain import digest, from_plain, read_yaml, to_plain
from .problem import Assignment, Source, Stage, Window
from .question import Question
from .solution import Solution
from .stages import Costs

VERSION = 1
STALL = "stall"
_WORDS = ("keep", "demand", "none")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One chunk of the model on one rank."""

    rank: int
    chunk: int
    layers: tuple[str, ...]
    """Of each layer, the name of its policy."""
    stalls: tuple[Window, ...]
    """Waits of the pipeline that served as windows."""
    in_flight: int
    hidden: float
    """Seconds of recomputation under windows, per micro-batch."""
    exposed: float
    """Seconds that nothing hides."""
    peak: int
    """Bytes at most on the rank, as the planner has it."""
    gap: float | None = None
    """Of the solver: 0 is optimal; null: it proves nothing."""
    search_seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a planner decided, with all that it was decided from."""

    question: Question
    solver: str
    policies: Mapping[str, Mapping[str, str]]
    """By name: of each operator, `keep`, `demand`, `none`, or a window."""
    stages: tuple[StagePlan, ...]
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a step, tokens per second and device, MFU, bytes at the peak."""

    @property
    def cut(self) -> tuple[int, ...]:
        """Layers of each stage in the model's order: what a run's `parallel.cut` takes."""
        ranks = 1 + max(stage.rank for stage in self.stages)

        def place(stage: StagePlan) -> tuple[int, int]:
            back = self.question.schedule == "dualpipev" and stage.chunk % 2 == 1
            return stage.chunk, ranks - 1 - stage.rank if back else stage.rank

        return tuple(len(stage.layers) for stage in sorted(self.stages, key=place))

    @property
    def hash(self) -> str:
        """Of the inputs: model, layout, cluster, budget and all else that was asked."""
        return digest(to_plain(self.question))


def plan_of(answer: Answer) -> Plan:
    """The plan of every rank of `answer`."""
    names: dict[tuple[tuple[str, str], ...], str] = {}
    stages = []
    for rank, of_rank in enumerate(answer.ranks):
        for chunk, (stage, solution) in enumerate(zip(of_rank.stages, of_rank.solutions, strict=True)):
            layers = []
            for number, sources in enumerate(solution.assignment):
                layer = stage.layers[number]
                words = tuple(
                    (operator.name, word_of(stage, number, source))
                    for operator, source in zip(layer.operators, sources, strict=True)
                )
                layers.append(names.setdefault(words, f"{layer.name}-{len(names) + 1}"))
            stages.append(_stage_plan(rank, chunk, tuple(layers), stage, solution))
    return Plan(
        question=answer.question,
        solver=answer.question.solver,
        policies={name: dict(words) for words, name in names.items()},
        stages=tuple(stages),
        predicted={
            "step_seconds": answer.step_seconds,
            "tokens_per_second_per_device": answer.tokens_per_second_per_device,
            "mfu": answer.mfu,
            "peak_bytes": max(answer.peak_bytes),
        },
    )


def _stage_plan(rank: int, chunk: int, layers: tuple[str, ...], stage: Stage, solution: Solution) -> StagePlan:
    return StagePlan(
        rank=rank,
        chunk=chunk,
        layers=layers,
        stalls=stage.stalls,
        in_flight=stage.in_flight,
        hidden=solution.outcome.hidden,
        exposed=solution.outcome.exposed,
        peak=solution.outcome.peak,
        gap=solution.gap,
        search_seconds=solution.search_seconds,
        note=solution.note,
    )


def word_of(stage: Stage, layer: int, source: Source) -> str:
    """`source` of an operator of `layer`, in words."""
    if not isinstance(source, int):
        return source
    event = stage.events[source]
    if event.layer < 0:
        return f"{STALL} {event.what.name}"
    away = event.layer - layer
    return f"{'backward' if event.backward else 'forward'} {event.what.name}" + (f" {away:+d}" if away else "")


def source_of(stage: Stage, layer: int, word: str) -> Source:
    """What `word_of` gave `word` for. Raises ValueError where there is no such window."""
    if word in _WORDS:
        return word  # pyright: ignore[reportReturnType]
    for at, event in enumerate(stage.events):
        if event.window is not None and word_of(stage, layer, at) == word:
            return at
    raise ValueError(f"plan: layer {layer} of {len(stage.layers)} has no window {word!r}")


def assignment_of(plan: Plan, number: int, stage: Stage) -> Assignment:
    """What stage `number` of the plan assigns. Raises ValueError where it is not of `stage`."""
    found = []
    for layer, name in enumerate(plan.stages[number].layers):
        policy = plan.policies[name]
        operators = [operator.name for operator in stage.layers[layer].operators]
        if list(policy) != operators:
            raise ValueError(f"plan: policy {name} is of other operators than layer {layer} has")
        found.append(tuple(source_of(stage, layer, word) for word in policy.values()))
    return tuple(found)


def write_plan(plan: Plan) -> str:
    """As YAML that `read_plan` reads back as it is."""
    plain = {
        "version": VERSION,
        "hash": plan.hash,
        "solver": plan.solver,
        "predicted": dict(plan.predicted),
        "policies": to_plain(plan.policies),
        "stages": to_plain(plan.stages),
        "question": to_plain(plan.question),
    }
    return _HEAD + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


_HEAD = """# A recomputation plan by `wastenot plan`. Seconds and bytes; `wastenot plan explain FILE OPERATOR` says why.
# keep: from the forward. demand: again, just before its use. none: nobody reads it. Else again, under that window.
"""


def read_plan(path: str | Path) -> Plan:
    """What `write_plan` wrote.

    Raises ValueError in one line: no such file, no plan, another version, inputs that were changed by hand.
    """
    return plan_from(read_yaml(path, "plan"), str(path))


def plan_from(given: Any, where: str) -> Plan:
    """The plan in plain values; errors name `where` they are from."""
    if not isinstance(given, Mapping) or "policies" not in given:
        raise ValueError(f"{where}: no plan; `wastenot plan CONFIG -o FILE` writes one")
    if given.get("version") != VERSION:
        raise ValueError(f"{where}: version: {given.get('version')!r} is not read here; use {VERSION}, planned anew")
    parts = {key: value for key, value in given.items() if key not in ("version", "hash")}
    plan = from_plain(Plan, parts, where)
    if plan.hash != given.get("hash"):
        raise ValueError(f"{where}: hash: its question was changed since it was planned; plan it again")
    unknown = {name for stage in plan.stages for name in stage.layers} - set(plan.policies)
    if unknown:
        raise ValueError(f"{where}: stages: there is no policy {min(unknown)!r}")
    return plan


def stage_of(plan: Plan, number: int, costs: Costs) -> Stage:
    """What the plan's stage `number` was planned for; `costs` are those of the plan's question."""
    planned = plan.stages[number]
    return costs.stages(planned.rank, planned.stalls).stages[planned.chunk]
