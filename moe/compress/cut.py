"""What a drop plan makes of each tensor, by its place alone: which go, which stay, and which rows. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .places import Part, Place
from .plan import DropPlan

__all__ = ["Cut", "Fate"]

_FEED_FORWARD: tuple[Part, ...] = ("norm", "router", "router_bias", "expert", "experts", "shared", "dense")
"""What Layer Drop takes."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a tensor that stays."""

    place: Place
    """In the target."""
    rows: tuple[int, ...] | None = None
    """Which of its first dim, in order; None: all."""
    zeroed: tuple[int, ...] | None = None
    """Of these rows of the target the values become zero; None: of none, empty: of all."""


class Cut:
    """What a plan makes of each tensor."""

    def __init__(self, plan: DropPlan) -> None:
        self._plan, shape = plan, plan.shape
        self._layers = {old: new for new, old in enumerate(plan.survivors)}
        kept = {layer: plan.kept(layer) for layer in shape.moe_layers}
        self._places = {layer: {old: new for new, old in enumerate(experts)} for layer, experts in kept.items()}
        self._rows = {
            layer: None if experts == tuple(range(shape.experts[layer])) else experts for layer, experts in kept.items()
        }

    def fate(self, place: Place) -> Fate | None:
        """What becomes of the tensor at `place`; None where it goes."""
        plan, layer = self._plan, place.layer
        if layer is None:
            return Fate(place)
        if place.part == "next_n":
            return Fate(replace(place, layer=len(self._layers) + layer - plan.shape.layers))
        if layer not in self._layers or (layer in plan.layers and place.part in _FEED_FORWARD):
            return None
        there = replace(place, layer=self._layers[layer])
        skipped = plan.experts.get(layer, ()) if plan.semantics == "skip" and place.weight == "down" else ()
        if place.part == "expert":
            assert place.expert is not None
            if place.expert not in self._places[layer]:
                return None
            is_zero = place.expert in skipped and place.leaf in ("weight", "bias")
            return Fate(replace(there, expert=self._places[layer][place.expert]), zeroed=() if is_zero else None)
        if place.part == "experts":
            zeroed = tuple(sorted(self._places[layer][expert] for expert in skipped))
            return Fate(there, self._rows[layer], zeroed or None)
        return Fate(there, self._rows[layer] if place.part in ("router", "router_bias") else None)
