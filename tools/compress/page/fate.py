"""What becomes of each layer and expert under a plan, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....moe.compress.plan import DropPlan

MOST_NAMES = 12
"""Of layers or experts in one sentence; there may be thousands."""


@dataclass(frozen=True)
class Fate:
    """Where the marks of a chart stand: what a plan takes, by the numbers of the whole checkpoint."""

    blocks: frozenset[int] = frozenset()
    """Layers that go whole."""
    layers: frozenset[int] = frozenset()
    """Layers that keep attention alone."""
    experts: frozenset[tuple[int, int]] = frozenset()
    """Layer and expert that go one by one."""


def fate_of(plan: DropPlan | None) -> Fate:
    """The marks of `plan`; none where there is no plan."""
    if plan is None:
        return Fate()
    single = frozenset((layer, expert) for layer, gone in plan.experts.items() for expert in gone)
    return Fate(frozenset(plan.blocks), frozenset(plan.layers), single)


def in_words(plan: DropPlan) -> list[str]:
    """Sentences about what goes and what is done to the rest."""
    shape, said = plan.shape, []
    if plan.blocks:
        said.append(
            f"{_of(len(plan.blocks), shape.layers, 'block')} {_goes(len(plan.blocks))}, attention and feed-forward "
            f"network alike: {named(plan.blocks)}."
        )
    if plan.layers:
        said.append(
            f"{_of(len(plan.layers), shape.layers, 'layer')} {_loses(len(plan.layers))} the router and all experts and "
            f"only attention stays: {named(plan.layers)}."
        )
    if plan.experts:
        gone, there = sum(map(len, plan.experts.values())), sum(shape.experts)
        how = (
            "tokens that would have chosen them choose among the others"
            if plan.semantics == "reroute"
            else "tokens that choose them lose that part, and their weights are stored as zeros"
        )
        said.append(f"{gone:,} of {there:,} experts go, from {_many(len(plan.experts), 'layer')}: {how}.")
    if plan.order:
        said.append(
            f"The experts of {_many(len(plan.order), 'layer')} are stored in another order, so that ranks that share "
            "them are evenly loaded."
        )
    if plan.slim is not None:
        method = {"wanda": "Wanda", "sparsegpt": "SparseGPT"}.get(plan.slim.method, plan.slim.method)
        said.append(
            f"{plan.slim.sparsity:.0%} of the weights of the experts that stay are set to zero "
            f"({plan.slim.pattern}, chosen by {method})."
        )
    if plan.quantize is not None:
        few = plan.quantize
        share = f"{few.group} of them to a scale" if few.bits == 4 else "a row of them to a scale"
        said.append(f"Weights of linear layers are stored in {few.bits} bits, {share}.")
    return said or ["Nothing goes."]


def how_chosen(plan: DropPlan | None, *what: str) -> str:
    """By which scores the plan chose `what`, as it says itself; empty where it does not."""
    criteria = {} if plan is None else plan.criteria
    return "; ".join(f"{name} by {criteria[name]}" for name in what if name in criteria)


def named(numbers: Sequence[int]) -> str:
    """1, 2 and 5; with an end where there are many."""
    names = [str(number) for number in numbers[:MOST_NAMES]]
    if len(numbers) > MOST_NAMES:
        return f"{', '.join(names)} and {len(numbers) - MOST_NAMES:,} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _of(part: int, whole: int, what: str) -> str:
    return f"{part} of {whole} {what}s"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _goes(number: int) -> str:
    return "goes" if number == 1 else "go"


def _loses(number: int) -> str:
    return "loses" if number == 1 else "lose"
