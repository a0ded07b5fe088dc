"""Which layout, schedule and micro-batch: all that are legal on so many devices, and which no other one beats.

Each candidate has a bound that takes no search: its step without any recomputation, whatever that holds. From the most
promising on, candidates are planned, unless a planned one is at least as fast as their bound with no more memory than
the least they can do with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from .assess import Answer, assess
from .layout import Layout
from .optimizer_state import Optimizer
from .question import Question
from .schedules import USUAL_CHUNKS
from .solution import InfeasibleError
from .stages import Costs
from .suggest import least_bytes


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is tried, in all combinations."""

    devices: int
    global_batch: int
    """Sequences per step, the same for all."""
    tensor: tuple[int, ...] = (1, 2, 4, 8)
    expert: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    pipeline: tuple[int, ...] = (1, 2, 4, 8, 16)
    micro_batch: tuple[int, ...] = (1, 2, 4)
    schedules: tuple[str, ...] = ("1f1b", "interleaved", "zb-h1", "dualpipev")
    solvers: tuple[str, ...] = ("heu-mix",)
    capacity_factors: tuple[float | None, ...] = (None,)
    optimizers: tuple[Optimizer, ...] = ()
    """Beside the question's own, where there are any."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One candidate that was planned."""

    question: Question
    tokens_per_second_per_device: float
    peak_bytes: int
    step_seconds: float
    mfu: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    front: tuple[Point, ...]
    """The fastest first; each has less memory than those before it."""
    planned: int
    bounded: int
    """Candidates that were not planned, for a planned one is better than they can be."""
    refused: Counter[str] = field(default_factory=Counter)
    """Why candidates cannot be, in the words of the first, and how many."""


class _Refused(Counter[str]):
    """Counts reasons by what they are about; the first of each stands for all."""

    def add(self, message: str) -> None:
        """One more."""
        about = re.search(r"layout\.\w+|^\w+", message)
        key = about[0] if about else message
        first = next((known for known in self if key in known), message)
        self[first] += 1


@dataclass(frozen=True)
class _Candidate:
    question: Question
    fastest: float
    """Tokens per second and device at most."""
    least: int
    """Bytes at least."""


def search(question: Question, space: Space, say: Callable[[int, int], None] = lambda done, of: None) -> Found:
    """The front of tokens per second against memory. `say` hears how many candidates of how many are done.

    Raises ValueError where nothing is legal or nothing fits.
    """
    refused = _Refused()
    candidates = sorted(_bounded(question, space, refused), key=lambda each: -each.fastest)
    points: list[Point] = []
    bounded = 0
    for done, candidate in enumerate(candidates):
        say(done, len(candidates))
        if any(p.tokens_per_second_per_device >= candidate.fastest and p.peak_bytes <= candidate.least for p in points):
            bounded += 1
            continue
        try:
            answer = assess(candidate.question)
        except InfeasibleError:
            refused.add("memory: no plan of this solver fits in the budget")
            continue
        points.append(_point(answer))
    if not points:
        reasons = "; ".join(f"{many} x {why}" for why, many in refused.most_common(3))
        raise ValueError(f"search: nothing fits {space.devices} devices: {reasons}")
    return Found(front=front(points), planned=len(points), bounded=bounded, refused=refused)


def front(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those that no other one beats in both: the fastest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.tokens_per_second_per_device, p.peak_bytes)):
        if not found or point.peak_bytes < found[-1].peak_bytes:
            found.append(point)
    return tuple(found)


def _bounded(question: Question, space: Space, refused: _Refused) -> Iterator[_Candidate]:
    for candidate in _candidates(question, space, refused):
        budget = candidate.bytes
        try:
            costs = Costs(candidate)
            least = max(
                least_bytes(stage) for rank in range(costs.schedule.num_ranks) for stage in costs.stages(rank).stages
            )
            if least > budget:
                refused.add("memory: what no plan can do without is more than the budget")
                continue
            ideal = assess(replace(candidate, solver="none", budget=2**62, fill_stalls=False))
        except ValueError as error:
            refused.add(str(error))
            continue
        yield _Candidate(candidate, ideal.tokens_per_second_per_device, least)


def _candidates(question: Question, space: Space, refused: _Refused) -> Iterator[Question]:
    shape = question.shape
    experts = space.expert if shape.experts is not None else (1,)
    optimizers = (question.optimizer, *space.optimizers)
    for tensor, expert, pipeline, micro_batch, schedule in product(
        space.tensor, experts, space.pipeline, space.micro_batch, space.schedules
    ):
        if space.devices % (tensor * pipeline):
            refused.add("devices: no multiple of tensor x pipeline")
            continue
        if pipeline == 1 and schedule != space.schedules[0]:
            # All schedules are one.
            continue
        data = space.devices // (tensor * pipeline)
        if space.global_batch % (data * micro_batch):
            refused.add("global_batch: no multiple of data x micro_batch")
            continue
        for factor, optimizer, solver in product(space.capacity_factors, optimizers, space.solvers):
            try:
                layout = replace(
                    question.layout,
                    tensor=tensor,
                    expert=expert,
                    pipeline=pipeline,
                    data=data,
                    shard=0,
                    sequence_parallel=tensor > 1,
                    chunks=USUAL_CHUNKS.get(schedule, 1) if pipeline > 1 else 1,
                    micro_batch=micro_batch,
                    micro_batches=space.global_batch // (data * micro_batch),
                    capacity_factor=factor,
                )
            except ValueError as error:
                refused.add(str(error))
                continue
            # Another number of stages is cut anew.
            yield replace(question, layout=layout, cut=None, schedule=schedule, optimizer=optimizer, solver=solver)


def _point(answer: Answer) -> Point:
    return Point(
        question=answer.question,
        tokens_per_second_per_device=answer.tokens_per_second_per_device,
        peak_bytes=max(answer.peak_bytes),
        step_seconds=answer.step_seconds,
        mfu=answer.mfu,
    )


def degrees(layout: Layout) -> str:
    """`TP2 EP8 PP4 DP8`."""
    return f"TP{layout.tensor} EP{layout.expert} PP{layout.pipeline} DP{layout.data}"
