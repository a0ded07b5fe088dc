"""Which action reads what another makes: outputs go down the stages, gradients back up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .schedule import FORWARD, NOTHING, WEIGHT, Schedule


def readers(schedule: Schedule) -> NDArray[np.int32]:
    """Of each action, the place of the one that reads what it makes, rank * steps + step; -1: none; [ranks, steps].

    A forward's is the next stage's, at the last stage its own backward. That a weight gradient reads the input
    gradient's pass, and a backward its forward, is kept by their order on the rank.
    """
    num_stages, num_steps = schedule.num_stages, schedule.kinds.shape[1]
    ranks, steps = np.nonzero((schedule.kinds != NOTHING) & (schedule.kinds != WEIGHT))
    micro_batches = schedule.micro_batches[ranks, steps]
    stages = schedule.stages[ranks, schedule.chunks[ranks, steps]]
    # A micro-batch's way: down the stages, then up; what the last one makes is read by none.
    along = np.where(schedule.kinds[ranks, steps] == FORWARD, stages, 2 * num_stages - 1 - stages)
    where = np.full((2 * num_stages + 1, schedule.num_micro_batches), -1, np.int32)
    where[along, micro_batches] = ranks * num_steps + steps
    found = np.full(schedule.kinds.shape, -1, np.int32)
    found[ranks, steps] = where[along + 1, micro_batches]
    return found
