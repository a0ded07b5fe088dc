"""A layout where none is asked for: the shortest pipeline whose ranks have room for what must be kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .evaluate import evaluate
from .extremes import all_on_demand
from .layout import Layout
from .problem import Stage
from .question import Question
from .shape import ModelShape
from .stages import Costs

_MOST_EXPERT = 64
_FILLED = 0.9
"""Of the budget, at most, by what no plan can do without."""
_MICRO_BATCHES = 4
"""For each rank of the pipeline."""


def suggested_layout(question: Question, devices: int) -> Layout:
    """The question's layout with degrees of parallelism for `devices`: no tensor parallelism, experts as far apart as
    they divide (64 ranks at most), ZeRO-1, and the shortest pipeline that fits.

    The longest pipeline there is where none does.
    """
    last = question.layout
    for layout in _candidates(question.shape, devices, question.layout):
        last = layout
        costs = Costs(replace(question, layout=layout, schedule="1f1b"))
        stages = (stage for rank in range(layout.pipeline) for stage in costs.stages(rank).stages)
        if all(least_bytes(stage) <= _FILLED * stage.budget for stage in stages):
            break
    return last


def _candidates(shape: ModelShape, devices: int, base: Layout) -> Iterator[Layout]:
    for pipeline in range(1, min(devices, shape.layers) + 1):
        # Powers of two, as clusters are cut.
        if devices % pipeline or pipeline & (pipeline - 1):
            continue
        data = devices // pipeline
        expert = 1
        if shape.experts is not None:
            both = [d for d in range(1, min(data, _MOST_EXPERT) + 1) if data % d == 0]
            expert = max(d for d in both if shape.experts.experts % d == 0)
        usual = 8 if pipeline == 1 else _MICRO_BATCHES * pipeline
        many = base.micro_batches if base.micro_batches > 1 else usual
        yield replace(base, pipeline=pipeline, data=data, expert=expert, zero=1 if data > 1 else 0, micro_batches=many)


def least_bytes(stage: Stage) -> int:
    """What the stage holds where all that may be computed again is: about the least that any plan holds."""
    return evaluate(stage, all_on_demand(stage)).peak
