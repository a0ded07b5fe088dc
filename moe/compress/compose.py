"""Two drop plans, the second made for what the first leaves, as one for the checkpoint of the first. Torch-free."""

from __future__ import annotations

from .plan import DropPlan

__all__ = ["compose"]


def compose(first: DropPlan, second: DropPlan) -> DropPlan:
    """The plan that leaves what `second` leaves of what `first` leaves, bit by bit.

    Raises ValueError where no plan does: `second` is of another shape, what it does to weights rests on a profile of
    what `first` leaves, `first` quantizes, or one of them skips experts and the other cuts some.
    """
    if second.shape != first.result:
        raise ValueError(f"shape: the second plan is for {second.shape}, and the first leaves {first.result}")
    if first.quantize:
        raise ValueError("quantize: nothing can be cut from what is quantized; quantize in the second plan instead")
    if second.slim or (second.quantize and second.profile):
        what = "slim" if second.slim else "quantize"
        raise ValueError(
            f"{what}: the second plan rests on a profile of what the first leaves; apply one after the other"
        )
    old = first.survivors
    blocks = {*first.blocks, *(old[block] for block in second.blocks)}
    layers = ({*first.layers} - blocks) | {old[layer] for layer in second.layers}
    removed: dict[int, tuple[int, ...]] = {}
    zeroed: dict[int, tuple[int, ...]] = {}
    order: dict[int, tuple[int, ...]] = {}
    for number, layer in enumerate(old):
        if layer in blocks or layer in layers or not first.shape.experts[layer]:
            continue
        before = first.kept(layer)
        kept = tuple(before[i] for i in second.kept(number))
        skipped = {*(first.experts.get(layer, ()) if first.semantics == "skip" else ())}
        skipped |= {before[i] for i in second.experts.get(number, ()) if second.semantics == "skip"}
        gone = tuple(expert for expert in range(first.shape.experts[layer]) if expert not in kept)
        if gone:
            removed[layer] = gone
        if skipped := skipped.intersection(kept):
            zeroed[layer] = tuple(sorted(skipped))
        if list(kept) != sorted(kept):
            order[layer] = kept
    if removed and zeroed:
        raise ValueError(
            f"semantics: experts of layer {min(removed)} go and those of layer {min(zeroed)} are skipped, which no one "
            "plan can say; use the same semantics in both, or apply one after the other"
        )
    return DropPlan(
        base=first.base,
        shape=first.shape,
        blocks=tuple(sorted(blocks)),
        layers=tuple(sorted(layers)),
        experts=zeroed or removed,
        semantics="skip" if zeroed else "reroute",
        order=order,
        slim=first.slim,
        quantize=second.quantize,
        profile=first.profile,
        criteria=_both(dict(first.criteria), dict(second.criteria)),
    )


def _both(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    then = {what: f"{first[what]}, then {score}" if what in first else score for what, score in second.items()}
    return first | then
