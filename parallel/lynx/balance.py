"""The cut of a model into pipeline stages that recomputation asks for (METHODS L6), for the question it is asked in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .memory import Share, kept_outside_layers, static_bytes, total
from .partition import Extra, partition
from .problem import Layer
from .question import Question
from .shape import LayerKind
from .stages import Costs
from .work import EndWork


def balanced(question: Question) -> Question:
    """`question` with the layers of each stage such that the slowest stage is as fast as moving layers makes it.

    Raises ValueError for schedules with several chunks a rank, whose cut would have to balance sums of them, and
    InfeasibleError where no cut that is tried fits.
    """
    costs = Costs(question)
    if costs.schedule.num_chunks > 1:
        raise ValueError(f"--balance: {question.schedule} has several stages on a rank; use 1f1b, gpipe or zb-h1")
    shape, layout, cluster = question.shape, question.layout, question.cluster
    kinds: dict[str, LayerKind] = {layer.name: kind for kind, layer in costs.layers.items()}

    def extra(layers: Sequence[Layer], is_first: bool, is_last: bool) -> Extra:
        share = Share(kinds=tuple(kinds[layer.name] for layer in layers), first=is_first, last=is_last)
        held = total(static_bytes(shape, layout, cluster, question.optimizer, share, question.skew))
        kept = kept_outside_layers(shape, layout, cluster, share)
        ends = [costs.embedding] * is_first + [costs.head] * is_last
        in_flight = costs.in_flight[0] * kept["embedding"] + costs.in_flight[-1] * kept["head"]
        return Extra(bytes=held + in_flight + costs.under_way, seconds=sum(map(_seconds, ends)))

    found = partition(
        [costs.layers[kind] for kind in shape.kinds],
        in_flight=costs.in_flight,
        budget=question.bytes,
        extra=extra,
        replay=question.replay,
        solver=question.solver,
    )
    return replace(question, cut=found.cut)


def _seconds(end: EndWork) -> float:
    return end.forward + end.backward + end.forward_exchange + end.backward_exchange
