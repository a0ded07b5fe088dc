"""What each rank does when, as blocks for traces and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from .readers import readers
from .simulate import Simulation
from .where_time_goes import hidden_early

Stream = Literal["compute", "communication", "gradient reduction", "to the next rank", "to the rank before"]
What = Literal[
    "forward",
    "backward",
    "input gradient",
    "weight gradient",
    "recomputation",
    "hidden recomputation",
    "communication",
    "hidden communication",
    "message",
    "gradient reduction",
    "optimizer",
]
OF_KIND: tuple[What, ...] = ("forward", "backward", "input gradient", "weight gradient")
"""By place in `schedule.KINDS`."""


class Block(NamedTuple):
    """One thing on one stream of a rank."""

    stream: Stream
    what: What
    micro_batch: int
    """-1: of no single one."""
    chunk: int
    """-1: of none."""
    start: float
    """Seconds since the step began."""
    end: float
    row: int = -1
    """Of the two passes that run beside each other, 0 for the forward and 1 for the backward; -1: it runs alone."""


def timeline(simulation: Simulation, rank: int, *, until: float = np.inf) -> list[Block]:
    """What `rank` does, by start; what starts before `until` seconds.

    Inside a pass the order is that of `passes`: recomputation, compute, communication.
    """
    blocks = [*_passes(simulation, rank, until), *_end_of_step(simulation, rank)]
    return sorted((b for b in blocks if b.end > b.start and b.start < until), key=lambda b: (b.start, -b.end))


def end_of(simulation: Simulation, num_micro_batches: int) -> float:
    """When the passes of the first `num_micro_batches` are through; of all of them, when the step is."""
    schedule = simulation.schedule
    if num_micro_batches >= schedule.num_micro_batches:
        return simulation.seconds
    first = simulation.passes.there & (schedule.micro_batches < num_micro_batches)
    return float(simulation.end[first].max())


def _passes(simulation: Simulation, rank: int, until: float) -> Iterator[Block]:
    schedule, parts = simulation.schedule, simulation.passes.of(rank)
    many = len(parts.total)
    starts, ends, arrivals = (times[rank, :many] for times in (simulation.start, simulation.end, simulation.arrival))
    # In lists, an element is a number of Python's.
    early, recompute, compute, exposed = (
        x.tolist() for x in (parts.early, parts.recompute, parts.compute, parts.exposed)
    )
    beside, hidden = (parts.communication - parts.exposed).tolist(), parts.hidden.tolist()
    waited = hidden_early(parts.early, starts, arrivals).tolist()
    start, end, kinds = starts.tolist(), ends.tolist(), schedule.kinds[rank].tolist()
    actions, second = schedule.actions(rank), simulation.passes.second[rank].tolist()
    for i, (_, micro_batch, chunk) in enumerate(actions):
        if start[i] >= until:
            return
        if second[i]:
            continue
        which = micro_batch, chunk
        ready = start[i] + early[i]
        computes = ready + recompute[i]
        computed = computes + compute[i]
        waits = end[i] - exposed[i]
        if schedule.beside_next[rank, i]:
            yield Block("compute", "forward", *which, start[i], computed, 0)
            which = actions[i + 1][1:]
            yield Block("compute", "recomputation", *which, ready, computes, 1)
            yield Block("compute", "backward", *which, computes, computed, 1)
        else:
            yield Block("compute", "hidden recomputation", *which, start[i], start[i] + waited[i])
            yield Block("compute", "recomputation", *which, start[i] + waited[i], computes)
            yield Block("compute", OF_KIND[kinds[i]], *which, computes, computed)
            yield Block("compute", "hidden recomputation", *which, waits, waits + hidden[i])
        yield Block("communication", "hidden communication", *which, ready, ready + beside[i])
        yield Block("communication", "communication", *which, waits, end[i])


def _end_of_step(simulation: Simulation, rank: int) -> Iterator[Block]:
    for chunk, (start, end) in enumerate(simulation.reduce[rank].tolist()):
        if simulation.work.ranks[rank].chunks[chunk].reduce_seconds:
            yield Block("gradient reduction", "gradient reduction", -1, chunk, start, end)
    start, end = simulation.optimizer[rank].tolist()
    yield Block("compute", "optimizer", -1, -1, start, end)


def messages(simulation: Simulation, ranks: Sequence[int], *, until: float = np.inf) -> dict[int, list[Block]]:
    """What each of `ranks` sends to its neighbours before `until` seconds."""
    schedule, of_pass = simulation.schedule, simulation.passes
    read_by = readers(schedule)
    arrivals = simulation.arrival.reshape(-1)
    found = {}
    for rank in ranks:
        seconds = of_pass.send_seconds[of_pass.codes[rank]]
        steps = np.flatnonzero(of_pass.there[rank] & (seconds > 0) & (simulation.end[rank] < until))
        arrived = arrivals[read_by[rank, steps]]
        ways = of_pass.link[of_pass.codes[rank, steps]] % 3
        columns = (ways, schedule.micro_batches[rank, steps], schedule.chunks[rank, steps], arrived - seconds[steps])
        found[rank] = [
            Block(("to the next rank", "to the rank before")[way], "message", micro_batch, chunk, start, end)
            for way, micro_batch, chunk, start, end in zip(
                *(c.tolist() for c in columns), arrived.tolist(), strict=True
            )
        ]
    return found
