"""Why a plan does with an operator what it does: each other way, tried on all layers that go this one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .evaluate import evaluate, violations
from .nearest import suggestion
from .plan import Plan, assignment_of, stage_of, word_of
from .problem import Assignment, Source, Stage
from .stages import Costs


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another source of the operator's output, in the same layers of the same stage."""

    word: str
    """As plans have it."""
    is_planned: bool
    exposed: float | None
    """Seconds of exposed recomputation of the stage, per micro-batch; None where it cannot be."""
    peak: int | None
    """Bytes of the stage at most."""
    why_not: str
    """Empty where it could be."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One operator in one stage."""

    operator: str
    rank: int
    chunk: int
    layers: tuple[int, ...]
    """Of the stage, those that have the operator in the policy that is explained."""
    word: str
    seconds: float
    bytes: int
    in_flight: int
    budget: int
    inputs: tuple[str, ...]
    read_by: tuple[str, ...]
    """Operators, and backward operators, that read its output."""
    alternatives: tuple[Alternative, ...]
    reason: str
    """In a sentence."""


def explain(plan: Plan, operator: str, rank: int | None = None) -> Explanation:
    """Why `operator` has its source in the plan: on `rank`, or on the first one that computes it again.

    Raises ValueError, in one line, for an operator or a rank that the plan does not have.
    """
    known = {name for policy in plan.policies.values() for name in policy}
    if operator not in known:
        raise ValueError(f"operator: {operator!r} is none of the plan's; {suggestion(operator, known)}")
    ranks = {stage.rank for stage in plan.stages}
    if rank is not None and rank not in ranks:
        raise ValueError(f"rank: {rank} is none of the plan's; use 0 to {max(ranks)}")
    number, name = _first(plan, operator, rank)
    costs = Costs(plan.question)
    stage, planned = stage_of(plan, number, costs), plan.stages[number]
    assignment = assignment_of(plan, number, stage)
    layers = tuple(i for i, policy in enumerate(planned.layers) if policy == name)
    layer = stage.layers[layers[0]]
    place = layer.index[operator]
    found = tuple(_alternatives(stage, assignment, layers, place))
    readers = [layer.operators[i].name for i in layer.readers[place]]
    readers += [each.name for each in layer.backward if operator in getattr(each, "reads", ())]
    what = layer.operators[place]
    word = plan.policies[name][operator]
    return Explanation(
        operator=operator,
        rank=planned.rank,
        chunk=planned.chunk,
        layers=layers,
        word=word,
        seconds=what.seconds,
        bytes=what.bytes,
        in_flight=stage.in_flight,
        budget=stage.budget,
        inputs=what.inputs,
        read_by=tuple(readers),
        alternatives=found,
        reason=_reason(word, found),
    )


def _first(plan: Plan, operator: str, rank: int | None) -> tuple[int, str]:
    """The stage, by number, and the policy that are explained."""
    kept: tuple[int, str] | None = None
    for number, stage in enumerate(plan.stages):
        if rank is not None and stage.rank != rank:
            continue
        for name in stage.layers:
            word = plan.policies[name].get(operator)
            if word not in (None, "keep", "none"):
                return number, name
            if word is not None and kept is None:
                kept = number, name
    if kept is None:
        raise ValueError(f"operator: no layer of rank {rank} has {operator!r}; leave --rank out")
    return kept


def _alternatives(stage: Stage, assignment: Assignment, layers: tuple[int, ...], place: int) -> Iterator[Alternative]:
    """The planned source first, then every other one that there is for the first of `layers`."""
    planned = assignment[layers[0]][place]
    seen = []
    windows = [at for at in range(len(stage.events)) if stage.events[at].window is not None]
    nearby = [at for at in windows if abs(stage.events[at].layer - layers[0]) <= 1 or stage.events[at].layer < 0]
    for source in (planned, "keep", *nearby, "demand", "none"):
        word = word_of(stage, layers[0], source)
        if word in seen:
            continue
        seen.append(word)
        changed = list(assignment)
        missing = ""
        for number in layers:
            own = _same(stage, number, layers[0], source)
            if own is None:
                missing = f"layer {number} has no such window"
                break
            changed[number] = (*changed[number][:place], own, *changed[number][place + 1 :])
        broken = [missing] if missing else violations(stage, tuple(changed))
        memory_only = len(broken) == 1 and broken[0].startswith("memory")
        outcome = evaluate(stage, tuple(changed)) if not broken or memory_only else None
        why_not = broken[0] if broken else ""
        if memory_only and outcome is not None:
            why_not = f"{_gib(outcome.peak - stage.budget)} over the budget"
        yield Alternative(
            word=word,
            is_planned=source == planned,
            exposed=None if outcome is None else outcome.exposed,
            peak=None if outcome is None else outcome.peak,
            why_not=why_not,
        )


def _same(stage: Stage, number: int, first: int, source: Source) -> Source | None:
    """What `source` of layer `first` is for layer `number`; None where that has no such window."""
    if not isinstance(source, int) or stage.events[source].layer < 0:
        return source
    event = stage.events[source]
    for at, other in enumerate(stage.events):
        if (other.layer - number, other.what.name, other.backward) == (
            event.layer - first,
            event.what.name,
            event.backward,
        ):
            return at
    return None


def _reason(word: str, found: tuple[Alternative, ...]) -> str:
    ways = {alternative.word: alternative for alternative in found}
    now, kept, demand = found[0], ways.get("keep"), ways.get("demand")
    if word == "none":
        return "nobody reads its output any more: what would, is kept or computed from elsewhere"
    if word == "keep":
        if demand is None or demand.exposed is None:
            return "it is always kept: what it holds cannot be computed again on this rank alone"
        assert now.exposed is not None and now.peak is not None and demand.peak is not None
        return (
            f"it fits: computing it again on demand would expose {_ms(demand.exposed - now.exposed)} more and save "
            f"{_gib(now.peak - demand.peak)}"
        )
    assert now.exposed is not None and now.peak is not None
    parts = []
    if kept is not None and kept.peak is not None:
        over = "which does not fit" if kept.why_not else "which the budget would allow, but not beside what it keeps"
        parts.append(f"keeping it would take {_gib(kept.peak - now.peak)} more, {over}")
    if word == "demand":
        parts.append("no window has room for it before its use")
    elif demand is not None and demand.exposed is not None:
        parts.append(f"under this window {_ms(demand.exposed - now.exposed)} less is exposed than on demand")
    return "; ".join(parts)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
