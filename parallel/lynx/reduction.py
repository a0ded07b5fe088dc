"""When each chunk's gradients are reduced over data-parallel replicas: in what the communication stream has left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .passes import Passes
from .pipeline_work import PipelineWork
from .schedule import BACKWARD, WEIGHT, Schedule

Times = NDArray[np.float64]


def reductions(schedule: Schedule, work: PipelineWork, of_pass: Passes, start: Times, end: Times) -> Times:
    """Start and end of each chunk's reduction, [ranks, chunks, 2].

    A reduction begins with the chunk's last gradient of weights, or after it (`reduce_beside_backward`); one at a time,
    and never beside the passes' own communication, which comes last in a pass. Passes do not get slower for it.
    """
    found = np.zeros((schedule.num_ranks, schedule.num_chunks, 2))
    for rank, of_rank in enumerate(work.ranks):
        kinds, chunks = schedule.kinds[rank], schedule.chunks[rank]
        makes = (kinds == BACKWARD) | (kinds == WEIGHT)
        lasts = [int(np.flatnonzero(makes & (chunks == chunk))[-1]) for chunk in range(schedule.num_chunks)]
        since = min(lasts)
        busy = of_pass.of(rank, since).communication
        ends = end[rank, since : since + len(busy)]
        free_at = 0.0
        for chunk in sorted(range(schedule.num_chunks), key=lasts.__getitem__):
            of_chunk, began, ended = (
                of_rank.chunks[chunk],
                *(float(times[rank, lasts[chunk]]) for times in (start, end)),
            )
            if work.reduce_beside_backward:
                began = max(free_at, began)
                through = _through(began, of_chunk.reduce_seconds, ends, busy)
                free_at = max(through, ended + of_chunk.reduce_tail_seconds)
            else:
                began = max(free_at, ended)
                free_at = _through(began, of_chunk.reduce_seconds, ends, busy)
            found[rank, chunk] = began, free_at
    return found


def _through(began: float, seconds: float, ends: Times, busy: Times) -> float:
    """When `seconds` from `began` on are through that no pass communicates in: each does `busy` before it ends."""
    for ended, taken in zip(ends.tolist(), busy.tolist(), strict=True):
        if began < ended:
            free = max(0.0, ended - taken - began)
            if seconds <= free:
                break
            seconds, began = seconds - free, ended
    return began + seconds
