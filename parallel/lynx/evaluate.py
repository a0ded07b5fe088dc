"""What an assignment costs and needs, by walking through the unit: the judge of every solver (METHODS L1-L5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .problem import Assignment, Outcome, Source, Stage


def violations(stage: Stage, assignment: Assignment) -> list[str]:
    """What of L1-L4 is not kept, one line each; nothing where the assignment may run."""
    if [len(layer.operators) for layer in stage.layers] != [len(sources) for sources in assignment]:
        return ["sources: not one for each operator of each layer"]
    layers = list(enumerate(assignment))
    found = [line for number, sources in layers for line in wrong_sources(stage, number, sources)]
    if not found:
        found = [line for number, sources in layers for line in wrong_order(stage, number, sources)]
    if not found:
        peak = evaluate(stage, assignment).peak
        if peak > stage.budget:
            found.append(f"memory: {peak} bytes at most, the budget is {stage.budget}")
    return found


def wrong_sources(stage: Stage, number: int, sources: Sequence[Source]) -> Iterator[str]:
    """L1 and L3, of one layer: every output that the backward reads has a source, and one that there may be."""
    layer = stage.layers[number]
    for i, (operator, source) in enumerate(zip(layer.operators, sources, strict=True)):
        what = f"layer {number}, {operator.name}"
        if source == "none" and layer.is_needed[i]:
            yield f"{what}: the backward reads it and nobody has it"
        if operator.kind == "input" and source != "keep":
            yield f"{what}: what came from the layer before is always kept"
        if operator.kind == "collective" and source != "keep" and source != "none":
            if isinstance(source, int):
                yield f"{what}: a collective is never placed in a window"
            elif not stage.replay:
                yield f"{what}: collectives are not replayed"
        if isinstance(source, int):
            if not 0 <= source < len(stage.events) or stage.events[source].window is None:
                yield f"{what}: event {source} is no window"
            elif source >= stage.last_window[number][i]:
                yield f"{what}: window {source} comes after its use"


def wrong_order(stage: Stage, number: int, sources: Sequence[Source]) -> Iterator[str]:
    """L2, of one layer: whatever is computed again finds its inputs."""
    layer = stage.layers[number]
    times = computed_at(stage, number, sources)
    for i, at in enumerate(times):
        if at is None:
            continue
        for j in layer.inputs[i]:
            there = sources[j] == "keep" or (times[j] is not None and _before(times[j], at, sources[j], sources[i]))
            if not there:
                yield f"layer {number}, {layer.operators[i].name}: {layer.operators[j].name} is not there"


def _before(first: int | None, second: int, source: Source, reader: Source) -> bool:
    """Whether what is computed at event `first` is there for what is computed at `second`.

    In one window operators run in their order; on demand, likewise; a window's do not wait for what is on demand.
    """
    assert first is not None
    if isinstance(reader, int) and source == "demand":
        return False
    return first <= second


def computed_at(stage: Stage, number: int, sources: Sequence[Source]) -> list[int | None]:
    """The event at which each output of a layer is computed again; None where it is not.

    On demand: at its first use, by the backward or by what is computed on demand from it.
    """
    found: list[int | None] = [source if isinstance(source, int) else None for source in sources]
    layer = stage.layers[number]
    for i in reversed(range(len(sources))):
        if sources[i] == "demand":
            uses = [*stage.reads[number][i][:1]]
            uses += [at for j in layer.readers[i] if sources[j] == "demand" and (at := found[j]) is not None]
            found[i] = min(uses, default=None)
    return found


@dataclass(frozen=True)
class Part:
    """What one layer adds to a unit."""

    demand: float
    """Seconds on demand."""
    kept: int
    """Bytes kept for one micro-batch."""
    load: dict[int, float]
    """Seconds by window."""
    change: dict[int, int]
    """Bytes that come at an event, less those whose last use was the event before."""


def part(stage: Stage, number: int, sources: Sequence[Source]) -> Part:
    """Of a layer whose sources keep L1-L3."""
    layer = stage.layers[number]
    times = computed_at(stage, number, sources)
    demand, kept = 0.0, 0
    load: dict[int, float] = {}
    change: dict[int, int] = {}
    for i, (operator, source, at) in enumerate(zip(layer.operators, sources, times, strict=True)):
        if source == "keep":
            kept += operator.bytes
        if at is None:
            continue
        if isinstance(source, int):
            load[source] = load.get(source, 0.0) + operator.seconds
        else:
            demand += operator.seconds
        # What leaves is still there at its last use.
        last = max(
            [at, *stage.reads[number][i][-1:], *(use for j in layer.readers[i] if (use := times[j]) is not None)]
        )
        change[at] = change.get(at, 0) + operator.bytes
        change[last + 1] = change.get(last + 1, 0) - operator.bytes
    return Part(demand, kept, load, change)


def evaluate(stage: Stage, assignment: Assignment) -> Outcome:
    """Seconds and bytes of `assignment`, which keeps L1-L3."""
    load: dict[int, float] = {}
    change = [0] * (len(stage.events) + 1)
    exposed, kept = 0.0, 0
    for number, sources in enumerate(assignment):
        each = part(stage, number, sources)
        exposed += each.demand
        kept += each.kept
        for at, seconds in each.load.items():
            load[at] = load.get(at, 0.0) + seconds
        for at, size in each.change.items():
            change[at] += size
    hidden, spilled = 0.0, {}
    for at, seconds in sorted(load.items()):
        window = stage.events[at].window
        assert window is not None
        over = max(0.0, seconds - window.room)
        if over:
            spilled[at] = over
        exposed += over
        hidden += seconds - over
    held = list(accumulate(change))
    most = max(held)
    return Outcome(
        exposed=exposed,
        hidden=hidden,
        peak=stage.static + stage.in_flight * kept + most,
        kept=kept,
        peak_at=held.index(most) if most else -1,
        spilled=spilled,
    )
