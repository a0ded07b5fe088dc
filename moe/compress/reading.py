"""What of a layer is read, whoever stored it: which experts, for how many choices, how large, in how many bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence

from torch import Tensor

from ...parallel.expert import local_experts
from ...parallel.mesh import Axis
from .places import Place
from .plan import Shape
from .quantize import dequantize
from .streamed import LayerSize

__all__ = ["chosen_experts", "most_choices", "read_whole", "share_of", "size_of", "whole_shapes"]

_CODES, _SCALES = ".q", ".scale"
"""What follows the name of a weight in those of the two tensors that stand for it in few bits (quantize.py)."""


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


def whole_shapes(stored: Mapping[str, Sequence[int]], packed: Container[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of weights, those in few bits as they are whole. `packed`: tensors with two codes in a byte."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in stored.items():
        if (weight := name.removesuffix(_CODES)) != name and weight + _SCALES in stored:
            shapes[weight] = (*shape[:-1], shape[-1] * (2 if name in packed else 1))
        elif not (name.endswith(_SCALES) and name.removesuffix(_SCALES) + _CODES in stored):
            shapes[name] = tuple(shape)
    return shapes


def read_whole(name: str, stored: Container[str], read: Callable[[str], Tensor]) -> Tensor:
    """The weight `name`, in few bits or not, from tensors that `read` gives by their names."""
    if name + _CODES not in stored:
        return read(name)
    return dequantize(read(name + _CODES), read(name + _SCALES))
