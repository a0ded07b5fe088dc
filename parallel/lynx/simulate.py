"""What a schedule takes: every pass of every rank at its time, by events.

All ranks of the pipeline advance together, each by its next action as soon as what that reads is there: there are about
as many rounds as one rank has actions, whatever the number of ranks, and a round is a few operations on arrays. What
data-, tensor- and expert-parallel replicas add is in the numbers given, so their count costs nothing.

Not modelled: the order of layers inside a pass (`passes`); compute slowed down by gradient reduction or messages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .passes import Passes, passes
from .pipeline_work import PipelineWork
from .readers import readers
from .reduction import reductions
from .schedule import FORWARD, WEIGHT, Schedule

Times = NDArray[np.float64]


class DeadlockError(ValueError):
    """A schedule whose ranks come to wait for each other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """One training step of one pipeline; times in seconds since it began, [ranks, steps] of the schedule's."""

    schedule: Schedule
    work: PipelineWork
    passes: Passes
    start: Times
    """The actions of a pair start and end together. After a rank's last action, both times are that action's end."""
    end: Times
    arrival: Times
    """When what an action reads of others was there; minus infinity: from the beginning."""
    reduce: Times
    """Start and end of each chunk's gradient reduction, [ranks, chunks, 2]."""
    optimizer: Times
    """Start and end of each rank's optimizer step, [ranks, 2]."""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return float(self.optimizer[:, 1].max())


def simulate(schedule: Schedule, work: PipelineWork) -> Simulation:
    """Runs `schedule`, taking `work`.

    Raises ValueError where `work` is for another number of ranks or chunks, and DeadlockError where ranks come to wait
    for each other.
    """
    chunks = {len(rank.chunks) for rank in work.ranks}
    if len(work.ranks) != schedule.num_ranks or chunks != {schedule.num_chunks}:
        raise ValueError(
            f"{schedule.name}: has {schedule.num_ranks} ranks with {schedule.num_chunks} chunks, but there is work for "
            f"{len(work.ranks)} ranks with {' or '.join(map(str, sorted(chunks)))}; give each chunk its own"
        )
    of_pass = passes(schedule, work)
    start, end, arrival = _run(schedule, of_pass)
    reduce = reductions(schedule, work, of_pass, start, end)
    begin = np.maximum(reduce[:, :, 1].max(axis=1), end[:, -1])
    if work.optimizer_waits_for_all:
        begin = np.full_like(begin, begin.max())
    optimizer = np.stack([begin, begin + [rank.optimizer_seconds for rank in work.ranks]], axis=1)
    return Simulation(
        schedule=schedule,
        work=work,
        passes=of_pass,
        start=start,
        end=end,
        arrival=arrival,
        reduce=reduce,
        optimizer=optimizer,
    )


def _run(schedule: Schedule, of_pass: Passes) -> tuple[Times, Times, Times]:
    """Start, end and arrival of every action."""
    num_ranks, num_steps = schedule.kinds.shape
    # A column more, of actions for which nothing ever arrives: ranks that are through wait there.
    shape = num_ranks, num_steps + 1
    start, end = np.zeros(shape), np.zeros(shape)
    # And one for what nobody reads, found as the last.
    flat_arrival = np.full(start.size + 1, np.inf)
    arrival = flat_arrival[:-1].reshape(shape)
    stages = schedule.stages[np.arange(num_ranks)[:, None], schedule.chunks]
    reads_nothing = ((schedule.kinds == FORWARD) & (stages == 0)) | (schedule.kinds == WEIGHT)
    arrival[:, :-1][reads_nothing] = -np.inf
    flat_start, flat_end = start.reshape(-1), end.reshape(-1)
    read_by = readers(schedule)
    # Rows are a column longer here.
    read_by = np.where(read_by < 0, -1, read_by + read_by // num_steps)
    flat_readers = np.append(read_by, np.full((num_ranks, 1), -1, np.int32), axis=1).reshape(-1)
    flat_codes = np.append(of_pass.codes, np.zeros((num_ranks, 1), np.int32), axis=1).reshape(-1)
    flat_paired = np.append(schedule.beside_next, np.zeros((num_ranks, 1), bool), axis=1).reshape(-1)
    has_pairs = bool(flat_paired.any())
    total, early = of_pass.parts.total, of_pass.parts.early
    send_seconds, link = of_pass.send_seconds, of_pass.link
    free, link_free = np.zeros(num_ranks), np.full(3 * num_ranks, -np.inf)
    first = np.arange(num_ranks) * (num_steps + 1)
    at = first.copy()

    def deliver(here: NDArray[np.int64], code: NDArray[np.int32], ended: Times) -> None:
        on = link[code]
        there = np.maximum(ended, link_free[on]) + send_seconds[code]
        link_free[on] = there
        flat_arrival[flat_readers[here]] = there

    while True:
        arrived = flat_arrival[at]
        if has_pairs:
            paired = flat_paired[at]
            arrived = np.maximum(arrived, flat_arrival[at + paired])
        [ready] = (arrived < np.inf).nonzero()
        if not len(ready):
            break
        here = at[ready]
        code = flat_codes[here]
        began = np.maximum(free[ready], arrived[ready] - early[code])
        ended = began + total[code]
        flat_start[here], flat_end[here], free[ready] = began, ended, ended
        deliver(here, code, ended)
        at[ready] += 1
        if has_pairs:
            ready = ready[paired[ready]]
            here = at[ready]
            flat_start[here], flat_end[here] = flat_start[here - 1], flat_end[here - 1]
            deliver(here, flat_codes[here], flat_end[here])
            at[ready] += 1

    done = at - first
    stuck = np.flatnonzero(done < schedule.num_actions).tolist()
    if stuck:
        waits = [f"rank {rank} with {schedule.actions(rank)[done[rank]]}" for rank in stuck]
        raise DeadlockError(f"{schedule.name} waits for ever: {', '.join(waits)}")
    start, end = (np.where(of_pass.there, times[:, :-1], free[:, None]) for times in (start, end))
    return start, end, arrival[:, :-1]
