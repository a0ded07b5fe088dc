"""What training would be like: every rank's plan, and the step that comes of them, simulated.

model + layout + cluster -> layers with times and bytes -> a plan for each stage -> the pipeline's step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .memory_curve import Memory
from .pipeline_work import PipelineWork
from .planned_work import rank_work
from .problem import Stage, Window
from .question import Question
from .simulate import Simulation, simulate
from .solution import InfeasibleError, Solution
from .solve import solve
from .stages import Costs, RankStages
from .stalls import stalls
from .where_time_goes import RankTimes, rank_times
from .work import model_flops


@dataclass(frozen=True, kw_only=True)
class RankPlan(RankStages):
    """One rank of the pipeline, planned."""

    solutions: tuple[Solution, ...]
    """One for each stage."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What comes of a question."""

    question: Question
    ranks: tuple[RankPlan, ...]
    simulation: Simulation

    @property
    def step_seconds(self) -> float:
        return self.simulation.seconds

    @property
    def tokens_per_second_per_device(self) -> float:
        layout = self.question.layout
        return layout.global_batch * layout.seq_len / self.step_seconds / layout.devices

    @property
    def mfu(self) -> float:
        """Model FLOPs, without recomputation, over what the devices' peak gives in a step."""
        question = self.question
        peak = question.cluster.device.peak[question.layout.compute]
        return model_flops(question.shape, question.layout) / (self.step_seconds * question.layout.devices * peak)

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Of each rank of the pipeline."""
        return tuple(int(peak) for peak in Memory(self.simulation).peak_bytes)

    @property
    def times(self) -> RankTimes:
        """Where each rank's seconds go."""
        return rank_times(self.simulation)

    @property
    def waste(self) -> dict[str, float]:
        """Parts of the devices' time, which add up to one; `compute` is what no plan can save."""
        times, all_seconds = self.times, self.step_seconds * len(self.ranks)
        parts = {
            "compute": times.compute,
            "exposed communication": times.communication,
            "exposed recompute": times.recompute,
            "pipeline warm-up": times.warm_up,
            "pipeline waits": times.steady,
            "pipeline cool-down": times.cool_down,
            "gradient reduction": times.reduce,
            "optimizer": times.optimizer,
        }
        return {name: float(seconds.sum() / all_seconds) for name, seconds in parts.items()}


def assess(question: Question) -> Answer:
    """Plans every stage and simulates the step.

    Raises ValueError, in one line, for what cannot be, and InfeasibleError where a rank does not fit in the budget:
    `smallest` is then the least that all ranks fit in.
    """
    costs = Costs(question)
    num_ranks = costs.schedule.num_ranks
    solved: dict[tuple[object, ...], Solution] = {}
    best = _answer(costs, [()] * num_ranks, solved)
    if question.fill_stalls and num_ranks > 1:
        # Where nothing is exposed, a further window hides nothing.
        waits = [stalls(best.simulation, rank) if _exposes(plan) else () for rank, plan in enumerate(best.ranks)]
        if any(waits):
            filled = _answer(costs, waits, solved)
            best = min(best, filled, key=lambda answer: answer.step_seconds)
    return best


def _exposes(plan: RankPlan) -> bool:
    """Whether recomputation is exposed, by more than rounding."""
    return any(solution.outcome.exposed > 1e-12 for solution in plan.solutions)


def _answer(costs: Costs, waits: Sequence[tuple[Window, ...]], solved: dict[tuple[object, ...], Solution]) -> Answer:
    """With these windows in each rank's waits; `solved` keeps what is solved."""
    question = costs.question
    ranks: list[RankPlan] = []
    short: list[InfeasibleError] = []
    for rank, windows in enumerate(waits):
        of_rank = costs.stages(rank, windows)
        try:
            solutions = tuple(_solved(question, stage, solved) for stage in of_rank.stages)
        except InfeasibleError as error:
            short.append(error)
            continue
        ranks.append(
            RankPlan(share=of_rank.share, stages=of_rank.stages, components=of_rank.components, solutions=solutions)
        )
    if short:
        largest = max(short, key=lambda error: error.smallest)
        raise InfeasibleError(
            largest.smallest,
            question.bytes,
            is_exact=all(error.is_exact for error in short),
            note=f"{len(short)} of {len(waits)} stages do not fit",
        )
    works = tuple(rank_work(costs, rank, plan, plan.solutions) for rank, plan in enumerate(ranks))
    speed = min((window.speed for layer in costs.layers.values() for window in layer.forward), default=1.0)
    simulation = simulate(costs.schedule, PipelineWork(ranks=works, pair_speed=speed))
    return Answer(question=question, ranks=tuple(ranks), simulation=simulation)


def _solved(question: Question, stage: Stage, solved: dict[tuple[object, ...], Solution]) -> Solution:
    """Stages that ask the same are solved once."""
    key = (stage.layers, stage.in_flight, stage.static, stage.stalls)
    if key not in solved:
        solved[key] = solve(stage, question.solver, question.time_limit)
    return solved[key]
