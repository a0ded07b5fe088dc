"""Schedules by name: a file for each family."""

from __future__ import annotations

from collections.abc import Callable

from ..schedule import Schedule
from .dualpipe import dualpipev
from .interleaved import interleaved
from .single import gpipe, one_f_one_b
from .zero_bubble import zb_h1

SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "dualpipev": dualpipev,
}
"""Builders, called with the number of ranks, of micro-batches and of chunks per rank."""
USUAL_CHUNKS = {"interleaved": 2, "dualpipev": 2}
"""Chunks per rank where none are asked for; 1 elsewhere."""


def build(name: str, *, num_ranks: int, num_micro_batches: int, num_chunks: int | None = None) -> Schedule:
    """The schedule called `name`.

    num_chunks: of the model on each rank, the schedule's usual number where it is None. Raises ValueError for a name
    that is none, and for sizes that the schedule does not have.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule: {name!r} is none; use {', '.join(SCHEDULES)}")
    if num_ranks < 1:
        raise ValueError(f"{name}: {num_ranks} ranks; use 1 or more")
    if num_micro_batches < 1:
        raise ValueError(f"{name}: {num_micro_batches} micro-batches; use 1 or more")
    chunks = USUAL_CHUNKS.get(name, 1) if num_chunks is None else num_chunks
    return SCHEDULES[name](num_ranks, num_micro_batches, chunks)
