"""What of a layer is read, whoever stored it: which experts, for how many choices, and how large it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ...parallel.expert import local_experts
from ...parallel.mesh import Axis
from .places import Place
from .plan import Shape
from .streamed import LayerSize

__all__ = ["chosen_experts", "most_choices", "share_of", "size_of"]


def chosen_experts(
    number: int, kept: Sequence[int] | None, experts: int, shape: Shape, smallest_group: int = 1
) -> tuple[int, ...]:
    """The experts of layer `number` to read, all where `kept` is None.

    Raises ValueError where it names others than the `experts` there are, one twice, none, or experts that a
    group-limited router could not choose among: of each group as many, `smallest_group` at least, group after group.
    """
    if kept is None:
        return tuple(range(experts))
    chosen = tuple(kept)
    if not chosen and experts:
        raise ValueError(f"kept: of layer {number} none is left; keep one at least, or read it with feed=False")
    if len(set(chosen)) != len(chosen) or any(not 0 <= expert < experts for expert in chosen):
        raise ValueError(f"kept: {list(chosen)} of layer {number} are not distinct experts of its {experts}")
    if experts and shape.groups > 1:
        width, left = experts // shape.groups, len(chosen) // shape.groups
        in_order = all(expert // width == place // left for place, expert in enumerate(chosen)) if left else False
        if len(chosen) % shape.groups or not in_order or left < smallest_group:
            raise ValueError(
                f"kept: {list(chosen)} of layer {number} are not equally many, {smallest_group} at least, of each of "
                f"its router's {shape.groups} groups, group after group"
            )
    elif experts and len(chosen) < smallest_group:
        raise ValueError(f"kept: layer {number} has {len(chosen)} left; its router reads {smallest_group} at least")
    return chosen


def share_of(chosen: Sequence[int], share: tuple[int, int]) -> Sequence[int]:
    """The r-th of n equal consecutive parts of `chosen`, for `share` (r, n). Raises ValueError where there are none."""
    rank, ranks = share
    own = local_experts(len(chosen), Axis("expert", ranks, rank))
    return chosen[own.start : own.stop]


def most_choices(experts: int, shape: Shape) -> int:
    """How many of `experts` a token can use; a router that is to choose more would fail, or choose one twice."""
    return experts // shape.groups * shape.top_groups


def size_of(tensors: Mapping[Place, Sequence[int]], experts: int) -> LayerSize:
    """Of a layer with so many experts, from the shapes of its tensors."""
    elements: Counter[str] = Counter()
    hidden = 0
    for place, shape in tensors.items():
        elements[place.part] += math.prod(shape)
        if place.weight == "down" and place.part in ("expert", "experts", "dense"):
            hidden = shape[-1]
    routed = elements["expert"] + elements["experts"] + elements["router"] + elements["router_bias"]
    feed = elements["norm"] + elements["shared"] + elements["dense"]
    return LayerSize(
        attention=elements["attention"],
        feed=feed,
        expert=routed // max(1, experts),
        num_experts=experts,
        hidden=hidden,
    )
