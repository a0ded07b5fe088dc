"""What people ask of an answer of the planner, worked out once: for the terminal, for machines and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..parallel.lynx.assess import Answer
from ..parallel.lynx.question import Question
from ..parallel.lynx.routing_skew import load_of
from ..parallel.lynx.solution import Solution
from .report.formats import count, size


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """The plan of one chunk of the model on one rank; its seconds are per micro-batch."""

    rank: int
    chunk: int
    layers: int
    in_flight: int
    """Micro-batches."""
    kept: int
    """Outputs of operators and collectives, over all layers; the layers' inputs, always kept, are not counted ..."""
    in_windows: int
    on_demand: int
    kept_bytes: int
    """... and are counted here; for each micro-batch in flight."""
    hidden_seconds: float
    """Recomputation under windows ..."""
    exposed_seconds: float
    """... and recomputation that nothing hides."""
    peak_bytes: int
    """Of the rank, as the planner bounds it; the simulation stays at or below."""
    solver: str
    gap: float | None
    """Part of the exposed seconds that may be too much; None: the solver proves nothing."""
    search_seconds: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How unevenly experts are used, in what one micro-batch of every rank sends."""

    skew: str
    fullest_to_mean: float
    """Rows that the fullest rank receives, in units of the mean."""
    dropped: float
    """Part of all routes that no slot is left for."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """An answer in numbers. Seconds are per step, and means over the ranks of the pipeline."""

    step_seconds: float
    tokens_per_second_per_device: float
    mfu: float
    waste: Mapping[str, float]
    """Parts of the step, which add up to 1."""
    exposed_communication_seconds: float
    exposed_recompute_seconds: float
    hidden_recompute_seconds: float
    peaks: tuple[int, ...]
    """Bytes, of each rank."""
    components: tuple[Mapping[str, int], ...]
    """Of each rank, what its peak is made of."""
    stages: tuple[StageFigures, ...]
    routing: Routing | None
    """None: no experts."""
    search_seconds: float
    """Of all stages' plans; stages that ask the same are searched once."""

    @property
    def fullest(self) -> int:
        """The rank with the largest peak."""
        return max(range(len(self.peaks)), key=self.peaks.__getitem__)

    @property
    def peak(self) -> int:
        """Of that rank."""
        return self.peaks[self.fullest]


def figures_of(answer: Answer) -> Figures:
    """The numbers of `answer`."""
    times, peaks = answer.times, answer.peak_bytes
    solutions = {id(each): each for plan in answer.ranks for each in plan.solutions}
    return Figures(
        step_seconds=answer.step_seconds,
        tokens_per_second_per_device=answer.tokens_per_second_per_device,
        mfu=answer.mfu,
        waste=answer.waste,
        exposed_communication_seconds=float(times.communication.mean()),
        exposed_recompute_seconds=float(times.recompute.mean()),
        hidden_recompute_seconds=float(times.hidden_recompute.mean()),
        peaks=peaks,
        components=tuple(_components(plan.components, peak) for plan, peak in zip(answer.ranks, peaks, strict=True)),
        stages=tuple(
            _stage(answer, rank, chunk) for rank, plan in enumerate(answer.ranks) for chunk in range(len(plan.stages))
        ),
        routing=_routing(answer.question),
        search_seconds=sum(each.search_seconds for each in solutions.values()),
    )


def _components(static: Mapping[str, int], peak: int) -> dict[str, int]:
    """With what the simulation adds: activations, and messages under way."""
    there = {name: size for name, size in static.items() if size}
    return {**there, "activations": peak - sum(there.values())}


def _stage(answer: Answer, rank: int, chunk: int) -> StageFigures:
    plan = answer.ranks[rank]
    stage, solution = plan.stages[chunk], plan.solutions[chunk]
    counts = _counts(solution, [[operator.kind for operator in layer.operators] for layer in stage.layers])
    return StageFigures(
        rank=rank,
        chunk=chunk,
        layers=len(stage.layers),
        in_flight=stage.in_flight,
        **counts,
        kept_bytes=solution.outcome.kept,
        hidden_seconds=solution.outcome.hidden,
        exposed_seconds=solution.outcome.exposed,
        peak_bytes=solution.outcome.peak,
        solver=solution.solver,
        gap=solution.gap,
        search_seconds=solution.search_seconds,
        note=solution.note,
    )


def _counts(solution: Solution, kinds: list[list[str]]) -> dict[str, int]:
    """Outputs by where they are from."""
    found = {"kept": 0, "in_windows": 0, "on_demand": 0}
    for sources, of_layer in zip(solution.assignment, kinds, strict=True):
        for source, kind in zip(sources, of_layer, strict=True):
            if isinstance(source, int):
                found["in_windows"] += 1
            elif source == "demand":
                found["on_demand"] += 1
            elif source == "keep" and kind != "input":
                found["kept"] += 1
    return found


def _routing(question: Question) -> Routing | None:
    experts = question.shape.experts
    if experts is None:
        return None
    load = load_of(experts, question.layout, question.skew)
    return Routing(
        skew=question.skew.name,
        fullest_to_mean=len(load.sent) * max(load.sent) / sum(load.sent),
        # Less is rounding.
        dropped=load.dropped if load.dropped > 1e-9 else 0.0,
    )


def model_line(question: Question) -> str:
    """`mixtral-8x7b on 64 x H100 SXM5 80GB (h100-nvlink8-ib)`."""
    cluster = question.cluster
    return f"{question.shape.name} on {count(question.layout.devices)} × {cluster.device.name} ({cluster.name})"


def layout_line(question: Question, origin: str) -> str:
    """Degrees of parallelism and where they are from, portions, schedule, optimizer, budget."""
    layout, device = question.layout, question.cluster.device
    degrees = {"TP": layout.tensor, "EP": layout.expert, "PP": layout.pipeline, "DP": layout.data}
    shown = " × ".join(f"{name}{degree}" for name, degree in degrees.items() if degree > 1) or "one device"
    chunks = f" of {layout.chunks} chunks" if layout.chunks > 1 else ""
    many = "1 micro-batch" if layout.micro_batches == 1 else f"{count(layout.micro_batches)} micro-batches"
    portions = f"{many} of {layout.micro_batch} × {count(layout.seq_len)} tokens"
    optimizer = question.optimizer.name + (f" with ZeRO-{layout.zero}" if layout.zero else "")
    budget = f"budget {size(question.bytes)}"
    if question.bytes != int(device.memory):
        budget += f" of {size(device.memory)}"
    return f"{shown} ({origin}) · {portions} · {question.schedule}{chunks} · {optimizer} · {budget}"
