"""Memory of each rank over a simulated step: static, activations of micro-batches in flight, and what comes and goes.

Frees count before what is made at the same time. Allocator, fragmentation and context are the caller's `static_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .readers import readers
from .schedule import BACKWARD, FORWARD, INPUT, WEIGHT
from .simulate import Simulation


@dataclass(frozen=True)
class Curve:
    """Bytes that one rank holds from each time on, until the next; before the first, its static ones."""

    seconds: NDArray[np.float64]
    bytes: NDArray[np.int64]


class Memory:
    """Of all ranks of `simulation`."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self._messages = _Messages(simulation) if simulation.passes.send_bytes.any() else None

    @cached_property
    def peak_bytes(self) -> NDArray[np.int64]:
        """Most that each rank holds, [ranks]."""
        static = [rank.static_bytes for rank in self.simulation.work.ranks]
        curves = (self.curve(rank).bytes for rank in range(len(static)))
        return np.array([max(own, int(curve.max())) for own, curve in zip(static, curves, strict=True)])

    @cached_property
    def in_flight(self) -> NDArray[np.int64]:
        """Most passes of each rank, one for every micro-batch and chunk, between the start of their forward and the
        input's gradient; [ranks]."""
        return self._most(FORWARD, (BACKWARD, INPUT))

    @cached_property
    def unfinished(self) -> NDArray[np.int64]:
        """Likewise, to the gradients of the weights."""
        return self._most(FORWARD, (BACKWARD, WEIGHT))

    def _most(self, begins: int, ends: tuple[int, ...]) -> NDArray[np.int64]:
        kinds = self.simulation.schedule.kinds
        change = (kinds == begins).astype(np.int32) - np.isin(kinds, ends)
        return change.cumsum(axis=1).max(axis=1)

    def curve(self, rank: int) -> Curve:
        """What `rank` holds over time."""
        seconds, change = _of_passes(self.simulation, rank)
        if self._messages is not None:
            seconds, change = self._messages.added(rank, seconds, change)
        return Curve(seconds, self.simulation.work.ranks[rank].static_bytes + change.cumsum())


def _of_passes(simulation: Simulation, rank: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """When the passes of `rank` change what it holds, in order, and by how many bytes."""
    schedule, second = simulation.schedule, simulation.passes.second
    many = int(schedule.num_actions[rank])
    kinds, chunks = schedule.kinds[rank, :many], schedule.chunks[rank, :many].astype(np.int64)
    of_chunks = simulation.work.ranks[rank].chunks
    activation, forward, early, backward = (
        np.array([getattr(chunk, f"{name}_bytes") for chunk in of_chunks], np.int64)[chunks]
        for name in ("activation", "forward", "early", "backward")
    )
    still = [chunk.activation_bytes if chunk.weight_bytes is None else chunk.weight_bytes for chunk in of_chunks]
    weight = np.array(still, np.int64)[chunks]
    is_forward, is_input, is_weight = kinds == FORWARD, kinds == INPUT, kinds == WEIGHT
    is_backward = (kinds == BACKWARD) | is_input
    # What is recomputed under a forward is for the backward just after it, or beside it.
    before = np.append(is_forward[:-1] & is_backward[1:], False)
    arrives = np.where(is_forward, activation + forward, 0) + np.where(is_backward, backward, 0)
    arrives += np.where(before, early, 0)
    leaves = np.where(is_forward, forward, 0) + np.where(is_backward, backward + activation, 0)
    leaves += np.where(is_weight, weight, 0) - np.where(is_input, weight, 0)
    leaves[1:] += np.where(before[:-1], early[:-1], 0)
    change = np.stack([arrives, -leaves], axis=1).reshape(-1)
    seconds = np.stack([simulation.start[rank, :many], simulation.end[rank, :many]], axis=1).reshape(-1)
    # Both of a pair start before either ends.
    starts = 2 * np.flatnonzero(second[rank, :many])
    for values in (change, seconds):
        values[starts - 1], values[starts] = values[starts], values[starts - 1].copy()
    return seconds, change


class _Messages:
    """What is held for messages: by the sender while they are under way, by the receiver until they are read."""

    def __init__(self, simulation: Simulation) -> None:
        schedule, of_pass = simulation.schedule, simulation.passes
        read_by = readers(schedule)
        self.bytes = np.where(of_pass.there & (read_by >= 0), of_pass.send_bytes[of_pass.codes], 0)
        places = np.nonzero(self.bytes)
        self.size = self.bytes[places]
        self.sender = places[0]
        reader = np.divmod(read_by[places], schedule.kinds.shape[1])
        self.receiver = reader[0]
        self.ended, self.arrived = simulation.end[places], simulation.arrival[reader]
        self.begun = self.arrived - of_pass.send_seconds[of_pass.codes[places]]
        # A pair's input is there until its start, an early recomputation's gradient until that is through.
        codes = of_pass.codes[reader]
        self.read = simulation.start[reader] + np.where(of_pass.second[reader], 0.0, of_pass.parts.early[codes])

    def added(
        self, rank: int, seconds: NDArray[np.float64], change: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """`seconds` and `change` of a rank with its messages' among them."""
        sent, received = self.sender == rank, self.receiver == rank
        gone = np.concatenate([self.arrived[sent], self.read[received]])
        come = np.concatenate([self.ended[sent], self.begun[received]])
        size = np.concatenate([self.size[sent], self.size[received]])
        held = gone > come
        gone, come, size = gone[held], come[held], size[held]
        # The input of a pass is among its activations: the message goes as the pass begins.
        seconds = np.concatenate([gone, seconds, come])
        order = np.argsort(seconds, kind="stable")
        return seconds[order], np.concatenate([-size, change, size])[order]
