"""The least harmful plan within a budget: greedy, one drop at a time, judged on held-out text.

One-shot scores are not additive: two layers that are harmless each may not be so together. Each step scores what the
drops before it left, takes the most promising candidates of every kind by their scores, and of those the one that
costs the least KL from the whole model for what it saves (METHODS C1-C3; the search is ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from .choose import NOTHING, Protect, fewer_experts, without
from .criteria import ExpertCriterion, block_scores, expert_scores, layer_scores, ranked
from .evaluate import Evaluator, Quality
from .plan import DropPlan
from .profile import Profile

__all__ = ["KINDS", "Options", "Step", "Target", "search"]

Kind = Literal["blocks", "layers", "experts"]
KINDS: tuple[Kind, ...] = ("blocks", "layers", "experts")
Cost = Callable[[DropPlan], float]


@dataclass(frozen=True)
class Target:
    """What the plan must reach: `cost(plan) <= most`; or, with `kl`, the cheapest plan of at most that much KL."""

    name: str
    """bytes, params or step-time: what `cost` counts."""
    cost: Cost
    most: float = 0.0
    kl: float | None = None


@dataclass(frozen=True)
class Step:
    """One plan on the way, with what it costs and how good it is."""

    plan: DropPlan
    cost: float
    quality: Quality
    tried: int
    """Candidates that were judged for it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which drops a search tries at every step: the most promising of each kind by its score."""

    kinds: tuple[Kind, ...] = KINDS
    each: int = 3
    """Candidates of each kind."""
    criterion: ExpertCriterion = "reap"
    experts_step: int = 1
    """Experts that go at once from a layer."""
    uniform: bool = True
    """Experts go from all layers alike, as stock models need it; else from one layer at a time."""
    protect: Protect = NOTHING

    def of(self, plan: DropPlan, profile: Profile) -> Iterator[DropPlan]:
        """Plans with one more drop than `plan`, which `profile` was taken under."""
        layers = plan.shape.layers
        if "blocks" in self.kinds and len(plan.survivors) > 1:
            scores = {n: score for n, score in block_scores(profile).items() if self.protect.allows(n, layers)}
            for layer in ranked(scores, highest=True)[: self.each]:
                yield without(plan, "blocks", [layer], "cosine, search")
        scores = {n: score for n, score in layer_scores(profile).items() if self.protect.allows(n, layers)}
        if "layers" in self.kinds:
            for layer in ranked(scores, highest=True)[: self.each]:
                yield without(plan, "layers", [layer], "cosine, search")
        if "experts" in self.kinds and scores:
            yield from self._fewer_experts(plan, profile, list(scores))

    def _fewer_experts(self, plan: DropPlan, profile: Profile, there: list[int]) -> Iterator[DropPlan]:
        worth = expert_scores(profile, self.criterion)
        step = math.lcm(self.experts_step, plan.shape.groups)
        least = {layer: sum(sorted(worth[layer])[:step]) for layer in there}
        choices = [there] if self.uniform else [[layer] for layer in ranked(least, highest=False)[: self.each]]
        for layers in choices:
            try:
                yield fewer_experts(plan, profile, layers, step, self.criterion)
            except ValueError:
                # The router would be left with too few.
                continue


def search(
    plan: DropPlan,
    judge: Evaluator,
    rescore: Callable[[DropPlan], Profile],
    target: Target,
    options: Options,
) -> Iterator[Step]:
    """Plans from `plan` on, each with one more drop, until the target is met: the last one is the answer.

    `rescore(plan)` profiles the model as a plan leaves it. Raises ValueError where nothing more can be dropped before
    the target is met.
    """
    quality = judge.quality(plan)
    yield Step(plan, target.cost(plan), quality, 0)
    while target.kl is not None or target.cost(plan) > target.most:
        judge.stand_at(plan)
        now = target.cost(plan)
        cheaper = [option for option in options.of(plan, rescore(plan)) if target.cost(option) < now]
        judged = [(option, judge.quality(option)) for option in cheaper]
        if target.kl is not None:
            judged = [each for each in judged if each[1].kl <= target.kl]
            if not judged:
                return
        if not judged:
            raise ValueError(
                f"{target.name}: {target.most:,.0f} cannot be reached; with all drops that are possible {now:,.0f} are "
                "left"
            )
        before = quality.kl
        plan, quality = min(judged, key=lambda each: (each[1].kl - before) / (now - target.cost(each[0])))
        yield Step(plan, target.cost(plan), quality, len(cheaper))
