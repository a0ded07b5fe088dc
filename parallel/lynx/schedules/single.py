"""Schedules of one chunk per rank with the whole backward in one piece: GPipe and 1F1B."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..schedule import BACKWARD, FORWARD, Passes, Schedule, assemble, ordered


def gpipe(num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965).

    Deviation: backwards come in the order of the forwards, as in torch, not in the opposite one; time and memory at
    most are the same.
    """
    expect_one_chunk("gpipe", num_chunks)
    kinds = np.repeat(np.array([FORWARD, BACKWARD], np.int8), num_micro_batches)
    order = ordered(kinds, dict.fromkeys((FORWARD, BACKWARD), in_turn(num_micro_batches)))
    return assemble("gpipe", [order] * num_ranks, num_micro_batches=num_micro_batches)


def one_f_one_b(num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """As many forwards as ranks follow, then one forward, one backward, and so on (PipeDream-Flush, 2006.09503)."""
    expect_one_chunk("1f1b", num_chunks)
    passes = dict.fromkeys((FORWARD, BACKWARD), in_turn(num_micro_batches))
    orders = [
        ordered(alternating(num_micro_batches, warm_up=num_ranks - 1 - rank), passes) for rank in range(num_ranks)
    ]
    return assemble("1f1b", orders, num_micro_batches=num_micro_batches)


def expect_one_chunk(name: str, num_chunks: int) -> None:
    """Raises ValueError where a schedule of one chunk per rank is asked for more."""
    if num_chunks != 1:
        raise ValueError(f"{name}: {num_chunks} chunks per rank; it has 1: use 1, or the schedule `interleaved`")


def in_turn(num_micro_batches: int) -> Passes:
    """Every micro-batch through chunk 0."""
    return np.arange(num_micro_batches, dtype=np.int32), np.zeros(num_micro_batches, np.int16)


def alternating(num_passes: int, *, warm_up: int) -> NDArray[np.int8]:
    """Kinds of `warm_up` forwards, of forward and backward in turn, and of the backwards that are left."""
    warm_up = min(warm_up, num_passes)
    kinds = np.full(2 * num_passes, BACKWARD, np.int8)
    kinds[:warm_up] = FORWARD
    kinds[warm_up : 2 * num_passes - warm_up : 2] = FORWARD
    return kinds
