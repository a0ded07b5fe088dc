"""Plans that `bench compress` judges: what each method chooses, and random drops of equal size."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import comb

from ...moe.compress.calibration import Calibration
from ...moe.compress.choose import Protect, drop_blocks, drop_experts, drop_layers, empty_plan, iterate
from ...moe.compress.criteria import EXPERT_CRITERIA
from ...moe.compress.evaluate import Evaluator
from ...moe.compress.plan import DropPlan
from ...moe.compress.profile import Profile, measure
from ...moe.compress.search import Options, Target, search
from ...moe.compress.streamed import StreamedModel

RANDOM = "random"
PLANNER = "planner"
"""The planner's own choice: the search with held-out KL."""


@dataclass(frozen=True)
class Choice:
    """One plan to judge."""

    case: str
    """What goes: `2 layers`, `4 blocks`, `keep 6 experts`."""
    method: str
    plan: DropPlan


@dataclass(frozen=True)
class Source:
    """What plans are made from."""

    model: StreamedModel
    profile: Profile
    text: Calibration
    """What drops are scored on again, and the search judges by: none of the text that plans are compared on."""
    judge: Evaluator
    """On that text."""

    def rescore(self, plan: DropPlan) -> Profile:
        """What `plan` leaves, profiled."""
        return measure(self.model, self.text, self.profile.config, plan=plan)


def layer_choices(source: Source, kind: str, count: int, randoms: int, say: Callable[[str], None]) -> Iterator[Choice]:
    """Drops of `count` MoE layers or blocks (`kind`), by every method."""
    case, start = f"{count} {kind}", empty_plan(source.profile)
    drop = drop_layers if kind == "layers" else drop_blocks
    yield Choice(case, "cosine", drop(start, source.profile, count))
    yield Choice(
        case, "cosine, iterative", iterate(start, count, lambda plan, seen: drop(plan, seen, 1), source.rescore)
    )
    if kind == "blocks":
        yield Choice(case, "cosine, consecutive", drop_blocks(start, source.profile, count, "consecutive"))
    say(f"{case}: searching")
    yield Choice(case, PLANNER, _searched(source, start, kind, count))
    there = source.profile.shape.moe_layers if kind == "layers" else tuple(range(source.profile.shape.layers))
    for number, gone in enumerate(_distinct(there, count, randoms, f"{case} 0")):
        yield Choice(case, f"{RANDOM} {number}", replace(start, **{kind: gone}))


def expert_choices(source: Source, keep: int, randoms: int) -> Iterator[Choice]:
    """Drops that leave `keep` experts in each layer (or on average), by every criterion."""
    case, start = f"keep {keep} experts", empty_plan(source.profile)
    for criterion in EXPERT_CRITERIA:
        yield Choice(case, criterion, drop_experts(start, source.profile, keep, criterion))
    yield Choice(case, "reap, global", drop_experts(start, source.profile, keep, "reap", "global"))
    draw = random.Random(f"{case} 0")
    shape = source.profile.shape
    for number in range(randoms):
        experts = {
            layer: tuple(sorted(draw.sample(range(shape.experts[layer]), shape.experts[layer] - keep)))
            for layer in shape.moe_layers
        }
        yield Choice(case, f"{RANDOM} {number}", replace(start, experts=experts))


def _searched(source: Source, start: DropPlan, kind: str, count: int) -> DropPlan:
    """The greedy search's plan with `count` drops of one kind; every layer that may go is tried at each step."""
    source.judge.stand_at(start)
    target = Target("drops", lambda plan: float(-len(plan.layers) - len(plan.blocks)), most=-float(count))
    options = Options(kinds=(kind,), each=source.profile.shape.layers, protect=Protect())  # pyright: ignore[reportArgumentType]
    *_, last = search(start, source.judge, source.rescore, target, options)
    return last.plan


def _distinct(there: tuple[int, ...], count: int, wanted: int, seed: str) -> list[tuple[int, ...]]:
    """`wanted` different subsets of `count`, or all there are."""
    draw, found = random.Random(seed), {}
    while len(found) < min(wanted, comb(len(there), count)):
        found[tuple(sorted(draw.sample(there, count)))] = None
    return list(found)
