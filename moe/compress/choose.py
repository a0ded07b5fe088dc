"""Which layers, blocks and experts go, by the scores of a profile (METHODS C1-C3). Reads no weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .criteria import ExpertCriterion, block_scores, expert_scores, layer_scores, ranked
from .placement import balanced_order
from .plan import DropPlan
from .profile import Profile

__all__ = [
    "Protect",
    "drop_blocks",
    "drop_experts",
    "drop_layers",
    "empty_plan",
    "fewer_experts",
    "iterate",
    "place_experts",
    "without",
]

BlockMode = Literal["discrete", "consecutive"]
Scope = Literal["layer", "global"]


@dataclass(frozen=True, kw_only=True)
class Protect:
    """Layers that stay whole: the first and the last so many."""

    first: int = 0
    last: int = 0

    def allows(self, layer: int, layers: int) -> bool:
        return self.first <= layer < layers - self.last


NOTHING = Protect()


def empty_plan(profile: Profile) -> DropPlan:
    """A plan that drops nothing yet, for the checkpoint of `profile`."""
    return DropPlan(base=profile.base, shape=profile.shape, profile=profile.fingerprint)


def drop_layers(plan: DropPlan, profile: Profile, count: int, protect: Protect = NOTHING) -> DropPlan:
    """`plan` with `count` more Layer Drops: of the MoE layers still there those that change the stream least (C1).

    `profile` is one of the checkpoint, or, to score again, of what `plan` leaves. Raises ValueError where fewer are
    left.
    """
    scores = layer_scores(profile)
    there = [layer for layer in scores if _is_there(plan, layer) and protect.allows(layer, plan.shape.layers)]
    _enough("layers", count, len(there), "MoE layers")
    gone = ranked({layer: scores[layer] for layer in there}, highest=True)[:count]
    return without(plan, "layers", gone, "cosine")


def drop_blocks(
    plan: DropPlan, profile: Profile, count: int, mode: BlockMode = "discrete", protect: Protect = NOTHING
) -> DropPlan:
    """`plan` with `count` more Block Drops (C2): those that change the stream least each by itself (`discrete`), or the
    `count` neighbours that change it least together (`consecutive`)."""
    window = 1 if mode == "discrete" else count
    if mode not in ("discrete", "consecutive"):
        raise ValueError(f"mode: {mode!r} is not one of discrete, consecutive")
    there = [layer for layer in plan.survivors if protect.allows(layer, plan.shape.layers)]
    # One block at least computes something.
    _enough("blocks", count, min(len(there), len(plan.survivors) - 1), "blocks")
    scores = block_scores(profile, window)
    if mode == "discrete":
        gone = ranked({layer: scores[layer] for layer in there}, highest=True)[:count]
    else:
        left = list(plan.survivors)
        runs = {first: left[left.index(first) :][:count] for first in there if first in scores}
        whole = {first: scores[first] for first, run in runs.items() if len(run) == count and {*run} <= {*there}}
        if not whole:
            raise ValueError(f"blocks: no {count} neighbours are left to drop together; use mode: discrete, or fewer")
        gone = runs[ranked(whole, highest=True)[0]]
    return without(plan, "blocks", gone, f"cosine, {mode}")


def drop_experts(
    plan: DropPlan,
    profile: Profile,
    keep: int,
    criterion: ExpertCriterion = "mass",
    scope: Scope = "layer",
    multiple_of: int = 1,
    protect: Protect = NOTHING,
) -> DropPlan:
    """`plan` with the least worthy experts gone, so that `keep` are left in each layer, or on average (`global`).

    multiple_of: experts left in a layer are a multiple of this, say of the ranks that will share them. Groups of a
    group-limited router lose equal numbers. Raises ValueError where that leaves fewer than the router chooses.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope: {scope!r} is not one of layer, global")
    shape = plan.shape
    scores = expert_scores(profile, criterion)
    there = [layer for layer in scores if _is_there(plan, layer) and protect.allows(layer, shape.layers)]
    step = multiple_of if shape.groups == 1 else math.lcm(multiple_of, shape.groups)
    least = -(-max(shape.top_k, _reachable(plan)) // step) * step
    fullest = max((shape.experts[layer] for layer in there), default=0)
    if not there:
        raise ValueError("experts: no layer is left that has any")
    if not least <= keep <= fullest or (scope == "layer" and keep % step):
        nearest = min(max(least, keep // step * step), fullest // step * step)
        raise ValueError(
            f"keep: {keep} of {fullest} experts cannot be left where the router chooses {shape.top_k} and their number "
            f"is a multiple of {step}; use {nearest}"
        )
    counts = _counts(plan, scores, there, keep, scope, step, least)
    experts = dict(plan.experts)
    for layer in there:
        gone = _least_worthy(scores[layer], len(scores[layer]) - counts[layer], shape.groups)
        experts.pop(layer, None)
        if gone:
            experts[layer] = gone
    order = {layer: kept for layer, kept in plan.order.items() if layer not in there}
    criteria = {**plan.criteria, "experts": f"{criterion}, by {scope}"}
    return replace(plan, experts=experts, order=order, criteria=criteria)


def place_experts(plan: DropPlan, profile: Profile, parts: int) -> DropPlan:
    """`plan` with surviving experts in an order by which `parts` equal shares of them, one for each expert-parallel
    rank, are as evenly loaded as the tokens of `profile` allow: one of the checkpoint, or better, as `plan` leaves it,
    where tokens have chosen among the survivors. Layers that do not divide are left as they are."""
    order: dict[int, tuple[int, ...]] = {}
    for layer in plan.survivors:
        kept = plan.kept(layer)
        if not kept or len(kept) % parts:
            continue
        load = profile.layers[layer]["routed_E"].tolist()
        if len(load) > len(kept):
            load = [load[expert] for expert in kept]
        places = balanced_order(load, parts, plan.shape.groups)
        if (placed := tuple(kept[place] for place in places)) != kept:
            order[layer] = placed
    return replace(plan, order=order)


def iterate(
    plan: DropPlan,
    count: int,
    drop_one: Callable[[DropPlan, Profile], DropPlan],
    rescore: Callable[[DropPlan], Profile],
) -> DropPlan:
    """`count` drops one at a time, each by scores of what the drops before it left: one-shot scores do not add up."""
    before = dict(plan.criteria)
    for _ in range(count):
        plan = drop_one(plan, rescore(plan))
    told = {name: how if before.get(name) == how else f"{how}, iterative" for name, how in plan.criteria.items()}
    return replace(plan, criteria=told)


def _is_there(plan: DropPlan, layer: int) -> bool:
    return layer not in plan.blocks and layer not in plan.layers


def without(plan: DropPlan, name: str, gone: Sequence[int], how: str) -> DropPlan:
    """`plan` with more in `name`, and nothing said of the experts of layers that go."""
    blocks = {*plan.blocks, *(gone if name == "blocks" else ())}
    layers = {*plan.layers, *(gone if name == "layers" else ())} - blocks
    cut = blocks | layers
    return replace(
        plan,
        blocks=tuple(sorted(blocks)),
        layers=tuple(sorted(layers)),
        experts={layer: ids for layer, ids in plan.experts.items() if layer not in cut},
        order={layer: ids for layer, ids in plan.order.items() if layer not in cut},
        criteria={**plan.criteria, name: how},
    )


def fewer_experts(
    plan: DropPlan, profile: Profile, layers: Sequence[int], count: int, criterion: ExpertCriterion
) -> DropPlan:
    """`plan` with the `count` least worthy surviving experts of each of `layers` gone as well; `profile` is one of what
    `plan` leaves. Raises ValueError where a router would be left with too few."""
    scores = expert_scores(profile, criterion)
    experts, order = dict(plan.experts), dict(plan.order)
    for layer in layers:
        kept = plan.kept(layer)
        gone = _least_worthy(scores[layer], count, plan.shape.groups)
        experts[layer] = tuple(sorted({*plan.experts.get(layer, ()), *(kept[place] for place in gone)}))
        order.pop(layer, None)
    return replace(plan, experts=experts, order=order, criteria={**plan.criteria, "experts": criterion})


def _enough(name: str, wanted: int, there: int, what: str) -> None:
    if not 1 <= wanted <= there:
        raise ValueError(f"{name}: {wanted} cannot be dropped of {there} {what} that may go; use 1 to {there}")


def _reachable(plan: DropPlan) -> int:
    """Experts that a layer needs so that a token finds top_k in the groups it may use."""
    shape = plan.shape
    return -(-shape.top_k // shape.top_groups) * shape.groups if shape.groups > 1 else shape.top_k


def _counts(
    plan: DropPlan,
    scores: dict[int, list[float]],
    there: list[int],
    keep: int,
    scope: Scope,
    step: int,
    least: int,
) -> dict[int, int]:
    """Experts left in each layer."""
    if scope == "layer":
        # Layers that have fewer already keep them all.
        return {layer: min(keep, len(scores[layer])) for layer in there}
    # From the least worthy of all layers on, `step` at a time from one layer, down to what each must keep.
    left = {layer: len(scores[layer]) for layer in there}
    queues = {layer: sorted(scores[layer]) for layer in there}
    goal = keep * len(there)
    while sum(left.values()) > goal:
        open_ = [layer for layer in there if left[layer] - step >= least]
        if not open_:
            break
        taken = {layer: len(scores[layer]) - left[layer] for layer in open_}
        cost = {layer: sum(queues[layer][taken[layer] : taken[layer] + step]) for layer in open_}
        left[ranked(cost, highest=False)[0]] -= step
    return left


def _least_worthy(scores: list[float], count: int, groups: int) -> tuple[int, ...]:
    """The `count` lowest, as many from each of `groups`; ascending."""
    assert 0 <= count < len(scores), (count, len(scores))
    width = len(scores) // groups
    gone: list[int] = []
    for group in range(groups):
        members = {expert: scores[expert] for expert in range(group * width, (group + 1) * width)}
        gone += ranked(members, highest=False)[: count // groups]
    return tuple(sorted(gone))
