"""Waits for a gradient in the steady part of a schedule, as windows to recompute in (reference/papers.md 2.6).

Before the first backward there is nothing to recompute, and as micro-batches run out memory falls anyway.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .problem import Window
from .schedule import BACKWARD, FORWARD, INPUT
from .simulate import Simulation


def stall_seconds(simulation: Simulation, rank: int) -> NDArray[np.float64]:
    """How long `rank` waits in each unit from the end of the forward for the gradient that the backward reads.

    Recomputation that ran meanwhile counts as waiting. A backward beside its forward has no such wait.
    """
    kinds = simulation.schedule.kinds[rank]
    units = 1 + np.flatnonzero((kinds[:-1] == FORWARD) & ((kinds[1:] == BACKWARD) | (kinds[1:] == INPUT)))
    units = units[~simulation.passes.second[rank, units]]
    return np.maximum(simulation.arrival[rank, units] - simulation.end[rank, units - 1], 0.0)


def stalls(simulation: Simulation, rank: int) -> tuple[Window, ...]:
    """The stall of a unit of `rank`, as a window of a planner's stage; none where units do not wait.

    It is the mean over the middle half of the units: where some wait and others do not, as with slow messages in 1F1B,
    a bit of recomputation in each turns the one into the other, and takes no time up to the mean. None where most
    backwards do not follow a forward, as in GPipe.
    """
    waits = stall_seconds(simulation, rank)
    num_backwards = simulation.schedule.num_micro_batches * simulation.schedule.num_chunks
    if 2 * len(waits) < num_backwards:
        return ()
    middle = waits[len(waits) // 4 : len(waits) - len(waits) // 4]
    seconds = float(middle.mean())
    # Less is rounding.
    return (Window(name="wait for the gradient", seconds=seconds),) if seconds > 1e-9 * simulation.seconds else ()
