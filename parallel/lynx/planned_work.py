"""A rank's work as the simulation has it: what its plans hide and expose, beside the work itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .gradient_traffic import reduction_seconds
from .memory import optimizer_seconds, total
from .pipeline_work import ChunkWork, Message, RankWork
from .problem import Stage
from .solution import Solution
from .stages import Costs, RankStages
from .steps import LayerWork
from .work import EndWork


def rank_work(costs: Costs, rank: int, of_rank: RankStages, solutions: Sequence[Solution]) -> RankWork:
    """What the simulation is told of `rank` with these plans."""
    question, schedule = costs.question, costs.schedule
    reduction = reduction_seconds(question.shape, question.layout, question.cluster, of_rank.share)
    sharded = question.layout.zero == 3
    gathers = sum(seconds for name, seconds in reduction.items() if name.endswith("weights"))
    sums = sum(seconds for name, seconds in reduction.items() if name.endswith("gradients"))
    many = len(of_rank.stages)
    works = []
    for place, (stage, solution) in enumerate(zip(of_rank.stages, solutions, strict=True)):
        number = int(schedule.stages[rank, place])
        kinds = [costs.works[kind] for kind in costs.kinds[number]]
        ends = [costs.embedding] * (number == 0) + [costs.head] * (number == schedule.num_stages - 1)
        chunk = _chunk_work(stage, solution, kinds, ends, costs.hop)
        if number == 0:
            chunk = replace(chunk, gradient=Message())
        if number == schedule.num_stages - 1:
            chunk = replace(chunk, output=Message())
        if sharded:
            # Gathered in every forward and backward, and scattered in every backward, beside compute.
            passes = many * question.layout.micro_batches
            chunk = replace(
                chunk,
                forward_beside_seconds=gathers / 2 / passes,
                backward_beside_seconds=(gathers / 2 + sums) / passes,
            )
        else:
            chunk = replace(chunk, reduce_seconds=sums / many)
        works.append(chunk)
    seconds = optimizer_seconds(of_rank.components, question.cluster) + (0.0 if sharded else gathers)
    return RankWork(chunks=tuple(works), static_bytes=total(of_rank.components), optimizer_seconds=seconds)


def _chunk_work(
    stage: Stage,
    solution: Solution,
    works: Sequence[LayerWork],
    ends: Sequence[EndWork],
    hop: Message,
) -> ChunkWork:
    """A chunk as the simulation has it: what the plan hides and exposes, beside the work itself."""
    outcome, events = solution.outcome, stage.events
    hidden = {"forward": 0.0, "backward": 0.0, "stall": 0.0}
    early = 0
    for layer, sources in zip(stage.layers, solution.assignment, strict=True):
        for operator, source in zip(layer.operators, sources, strict=True):
            if isinstance(source, int):
                hidden[_where(events[source].layer, events[source].backward)] += operator.seconds
                early += 0 if events[source].backward else operator.bytes
    for at, seconds in outcome.spilled.items():
        hidden[_where(events[at].layer, events[at].backward)] -= seconds
    most = outcome.peak - stage.static - stage.in_flight * outcome.kept
    backward = sum(work.backward for work in works) + sum(end.backward for end in ends)
    weights = sum(sum(work.weight_gradients.values()) for work in works) + sum(end.weight_gradients for end in ends)
    exposed = sum(work.backward_exchange for work in works) + sum(end.backward_exchange for end in ends)
    return ChunkWork(
        forward_seconds=sum(work.forward for work in works) + sum(end.forward for end in ends),
        input_seconds=backward - weights,
        weight_seconds=weights,
        forward_exposed_seconds=sum(work.forward_exchange for work in works)
        + sum(end.forward_exchange for end in ends),
        backward_exposed_seconds=exposed,
        recompute_seconds=outcome.exposed,
        early_recompute_seconds=max(0.0, hidden["stall"]),
        forward_hidden_seconds=max(0.0, hidden["forward"]),
        backward_hidden_seconds=max(0.0, hidden["backward"]),
        activation_bytes=outcome.kept + sum(end.saved for end in ends),
        early_bytes=min(early, most),
        backward_bytes=most - min(early, most),
        output=hop,
        gradient=hop,
    )


def _where(layer: int, backward: bool) -> str:
    return "stall" if layer < 0 else "backward" if backward else "forward"
