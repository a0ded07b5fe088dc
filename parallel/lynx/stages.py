"""From a question to the stages that solvers plan for: layers with their windows, micro-batches in flight, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .calibration import fingerprint, timed_work
from .cut import even_cut, kinds_of, share_of
from .layout import check
from .memory import Share, kept_outside_layers, static_bytes, total
from .pipeline_work import Message
from .problem import Layer, Stage, Window
from .question import Question
from .schedule import BACKWARD, FORWARD, WEIGHT, Schedule
from .schedules import build
from .shape import LayerKind
from .steps import LayerWork
from .work import embedding_of, head_of, hop_seconds, work_of

_MESSAGES = 4
"""Activations and gradients under way, at most: one each way that leaves, one each way that came."""


@dataclass(frozen=True, kw_only=True)
class RankStages:
    """What one rank of the pipeline is to plan for."""

    share: Share
    stages: tuple[Stage, ...]
    """One for each chunk of the model."""
    components: Mapping[str, int]
    """Bytes beside activations, by what they are for."""


class Costs:
    """What the question's parts take, computed once. Raises ValueError, in one line, for what cannot be."""

    def __init__(self, question: Question) -> None:
        shape, layout, cluster = question.shape, question.layout, question.cluster
        check(shape, layout)
        self.question = question
        self.schedule = schedule = build(
            question.schedule,
            num_ranks=layout.pipeline,
            num_micro_batches=layout.micro_batches,
            num_chunks=layout.chunks if layout.chunks > 1 else None,
        )
        self.cut = question.cut or even_cut(shape, schedule.num_stages)
        self.kinds = kinds_of(shape, self.cut)
        self.works: dict[LayerKind, LayerWork] = {
            kind: self._timed(work_of(shape, layout, cluster, question.skew, kind))
            for kind in dict.fromkeys(shape.kinds)
        }
        self.layers: dict[LayerKind, Layer] = {kind: self._layer(work.layer) for kind, work in self.works.items()}
        self.embedding, self.head = embedding_of(shape, layout, cluster), head_of(shape, layout, cluster)
        size = layout.local_tokens * shape.d_model * layout.residual_bytes
        self.hop = Message(seconds=hop_seconds(shape, layout, cluster) if layout.pipeline > 1 else 0.0, bytes=size)
        self.in_flight = _in_flight(schedule)
        self.under_way = _MESSAGES * size if schedule.num_ranks > 1 else 0
        """Bytes of messages, at most."""

    def _timed(self, work: LayerWork) -> LayerWork:
        """With the times that were measured."""
        question = self.question
        if question.calibration is None:
            return work
        same = fingerprint(question.shape, question.layout, question.skew)
        return timed_work(work, question.calibration, same)

    def _layer(self, layer: Layer) -> Layer:
        """With the windows that the schedule leaves."""
        if self.schedule.name in ("gpipe", "dualpipev"):
            # No backward comes after the forward of another micro-batch, or its compute is under these already.
            layer = replace(layer, forward=())
        if self.schedule.name == "dualpipev":
            layer = replace(layer, backward=tuple(each for each in layer.backward if not isinstance(each, Window)))
        return layer

    def stages(self, rank: int, waits: tuple[Window, ...] = ()) -> RankStages:
        """What `rank` is to plan for, with `waits` as further windows."""
        question, schedule = self.question, self.schedule
        own = [int(stage) for stage in schedule.stages[rank]]
        share = share_of(own, self.kinds)
        components = static_bytes(
            question.shape, question.layout, question.cluster, question.optimizer, share, question.skew
        )
        in_flight = self.in_flight[rank]
        outside = in_flight * total(kept_outside_layers(question.shape, question.layout, question.cluster, share))
        stages = tuple(
            Stage(
                layers=tuple(self.layers[kind] for kind in self.kinds[stage]),
                in_flight=in_flight,
                budget=question.bytes,
                static=total(components) + outside + self.under_way,
                stalls=waits,
                replay=question.replay,
            )
            for stage in own
        )
        return RankStages(share=share, stages=stages, components=components)


def _in_flight(schedule: Schedule) -> list[int]:
    """Most passes of each rank between their forward and the gradients of their weights."""
    ends = (schedule.kinds == BACKWARD) | (schedule.kinds == WEIGHT)
    return ((schedule.kinds == FORWARD).astype(int) - ends).cumsum(axis=1).max(axis=1).tolist()
