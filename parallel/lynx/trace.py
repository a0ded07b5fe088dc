"""A simulated step as a trace for chrome://tracing and ui.perfetto.dev (the Trace Event Format, JSON object form).

A rank is a process, its streams are threads, its memory is a counter; times are in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .memory_curve import Memory
from .simulate import Simulation
from .timeline import Block, end_of, messages, timeline

THREADS = ("compute", "communication", "gradient reduction", "to the next rank", "to the rank before")
"""Streams, in the order of their threads."""

Event = dict[str, Any]


def trace(simulation: Simulation, *, num_ranks: int = 32, num_micro_batches: int = 64) -> dict[str, Any]:
    """The trace as JSON values.

    num_ranks: at most so many, evenly spread, with the first and the last; num_micro_batches: up to the end of the
    first so many. Both keep the file small: an event takes about 140 bytes. Raises ValueError where one is below 1.
    """
    for name, number in (("num_ranks", num_ranks), ("num_micro_batches", num_micro_batches)):
        if number < 1:
            raise ValueError(f"{name}: {number}; use 1 or more")
    schedule = simulation.schedule
    ranks = spread(schedule.num_ranks, num_ranks)
    until = end_of(simulation, num_micro_batches)
    sent = messages(simulation, ranks, until=until)
    memory = Memory(simulation)
    events: list[Event] = []
    for rank in ranks:
        blocks = timeline(simulation, rank, until=until) + sent[rank]
        events += _names(rank, {block.stream for block in blocks})
        events += [_complete(rank, block) for block in blocks]
        events += _memory(rank, memory, until, simulation.work.ranks[rank].static_bytes)
    told = {
        "schedule": schedule.name,
        "step_seconds": simulation.seconds,
        "ranks": schedule.num_ranks,
        "ranks_written": ranks,
        "micro_batches": schedule.num_micro_batches,
        "seconds_written": until,
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": told}


def write_trace(simulation: Simulation, path: Path, *, num_ranks: int = 32, num_micro_batches: int = 64) -> None:
    """Writes `trace` to `path`."""
    written = trace(simulation, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    path.write_text(json.dumps(written, separators=(",", ":")))


def spread(many: int, at_most: int) -> list[int]:
    """`at_most` numbers below `many`, evenly spread, with the first and the last."""
    return sorted({int(number) for number in np.linspace(0, many - 1, min(many, at_most)).round()})


def _names(rank: int, streams: set[str]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    for number, name in enumerate(THREADS):
        if name in streams:
            yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": name}}
            yield {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": number, "args": {"sort_index": number}}


def _complete(rank: int, block: Block) -> Event:
    args = {"micro_batch": block.micro_batch, "chunk": block.chunk}
    return {
        "ph": "X",
        "name": block.what if block.micro_batch < 0 else f"{block.what} {block.micro_batch}",
        "cat": block.what,
        "pid": rank,
        "tid": THREADS.index(block.stream),
        "ts": 1e6 * block.start,
        "dur": 1e6 * (block.end - block.start),
        "args": {name: number for name, number in args.items() if number >= 0},
    }


def _memory(rank: int, memory: Memory, until: float, static_bytes: int) -> Iterator[Event]:
    curve = memory.curve(rank)
    times, values = [0.0, *curve.seconds.tolist()], [static_bytes, *curve.bytes.tolist()]
    for seconds, num_bytes, following in zip(times, values, [*times[1:], np.inf], strict=True):
        # Of changes at one time, the last tells.
        if seconds <= until and following > seconds:
            yield {
                "ph": "C",
                "name": "memory",
                "pid": rank,
                "tid": 0,
                "ts": 1e6 * seconds,
                "args": {"bytes": num_bytes},
            }
