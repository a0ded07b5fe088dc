"""The same question under several recomputation policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..parallel.lynx.assess import Answer, assess
from ..parallel.lynx.solution import InfeasibleError
from ..parallel.lynx.solve import SOLVERS
from .lynx_figures import Figures, figures_of

USUAL = ("none", "full", "selective", "greedy", "heu", "heu-mix")
"""What is compared where nothing is asked for: what answers at once."""
REFERENCE = "full"
"""What ratios are to."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What came of one policy: an answer, or the bytes that it would need."""

    name: str
    answer: Answer | None = None
    figures: Figures | None = None
    needs_bytes: int | None = None


def compare(
    answer: Answer, names: Sequence[str], follow: Callable[[str], None] = lambda name: None
) -> tuple[Policy, ...]:
    """`answer` beside what policies `names` and the reference come to, in the usual order, others after it.

    `follow` is told of each policy before it is searched for.
    """
    own = answer.question.solver
    found = []
    for name in in_order({*names, REFERENCE, own}):
        if name == own:
            found.append(Policy(name=name, answer=answer, figures=figures_of(answer)))
            continue
        follow(name)
        try:
            other = assess(replace(answer.question, solver=name))
        except InfeasibleError as error:
            found.append(Policy(name=name, needs_bytes=error.smallest))
        else:
            found.append(Policy(name=name, answer=other, figures=figures_of(other)))
    return tuple(found)


def in_order(names: Iterable[str]) -> list[str]:
    """`names`, the usual ones first."""
    order = [*USUAL, *(name for name in SOLVERS if name not in USUAL)]
    return sorted(names, key=order.index)


def ratio(policy: Policy, policies: Sequence[Policy]) -> float | None:
    """Step time in units of the reference's; None where one of both does not fit."""
    reference = next(each.figures for each in policies if each.name == REFERENCE)
    if policy.figures is None or reference is None:
        return None
    return policy.figures.step_seconds / reference.step_seconds
