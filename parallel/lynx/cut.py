"""How the layers of a model are cut into the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from .memory import Share
from .shape import LayerKind, ModelShape


def even_cut(shape: ModelShape, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as equal as they can be: the last stages have one less, whose end has the output layer."""
    each, more = divmod(shape.layers, stages)
    return tuple(each + (stage < more) for stage in range(stages))


def kinds_of(shape: ModelShape, cut: Sequence[int]) -> tuple[tuple[LayerKind, ...], ...]:
    """The kinds of the layers of each stage. Raises ValueError where `cut` is not one of all layers."""
    if sum(cut) != shape.layers or min(cut) < 1:
        raise ValueError(f"cut: {list(cut)} does not make {shape.layers} layers, one or more a stage")
    found, first = [], 0
    for many in cut:
        found.append(tuple(shape.kinds[first : first + many]))
        first += many
    return tuple(found)


def share_of(stages: Sequence[int], kinds: Sequence[tuple[LayerKind, ...]]) -> Share:
    """What the rank of these stages holds."""
    return Share(
        kinds=tuple(kind for stage in stages for kind in kinds[stage]),
        first=0 in stages,
        last=len(kinds) - 1 in stages,
    )
