"""Whether a schedule does all work once, in an order that comes to an end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..pipeline_work import ChunkWork, PipelineWork, RankWork
from ..schedule import BACKWARD, INPUT, KINDS, NOTHING, WEIGHT, Action, Schedule
from ..simulate import DeadlockError, simulate


def problems(schedule: Schedule) -> list[str]:
    """What is wrong with `schedule`, one line each; nothing where it can run."""
    found = [line for rank in range(schedule.num_ranks) for line in _of_rank(schedule, rank)]
    if found:
        return found
    rank = RankWork(chunks=(ChunkWork(forward_seconds=1.0, input_seconds=1.0),) * schedule.num_chunks)
    try:
        simulate(schedule, PipelineWork(ranks=(rank,) * schedule.num_ranks))
    except DeadlockError as error:
        return [str(error)]
    return []


def _of_rank(schedule: Schedule, rank: int) -> Iterator[str]:
    """Each micro-batch once through each chunk: forward, then the backward, whole or in its two parts."""
    shape = len(KINDS), schedule.num_micro_batches, schedule.num_chunks
    there = schedule.kinds[rank] != NOTHING
    columns = (schedule.kinds[rank], schedule.micro_batches[rank], schedule.chunks[rank])
    each = tuple(column[there].astype(np.int64) for column in columns)
    times = np.zeros(shape, np.int64)
    np.add.at(times, each, 1)
    at = np.zeros(shape, np.int64)
    at[each] = np.arange(len(each[0]))
    # A backward in two parts is a whole one fewer.
    expected = np.ones_like(times)
    split = (times[INPUT] > 0) | (times[WEIGHT] > 0)
    expected[BACKWARD], expected[INPUT], expected[WEIGHT] = ~split, split, split
    wrong = np.argwhere(times != expected)
    for kind, micro_batch, chunk in wrong.tolist():
        action = Action(KINDS[kind], micro_batch, chunk)
        yield f"rank {rank}: {action} is there {times[kind, micro_batch, chunk]} times"
    if len(wrong):
        return
    # What a backward needs of its own forward comes round through the other ranks, and shows as a deadlock.
    for micro_batch, chunk in np.argwhere((times[WEIGHT] > 0) & (at[WEIGHT] < at[INPUT])).tolist():
        after, before = (Action(KINDS[kind], micro_batch, chunk) for kind in (WEIGHT, INPUT))
        yield f"rank {rank}: {after} comes before {before}"
