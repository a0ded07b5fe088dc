"""ZB-H1: the weight gradient fills what the input gradient waits for (Qi et al., arXiv 2401.10241, section 2.1).

As much memory as 1F1B takes on its first rank; ZB-H2, which takes twice that and has no bubble, is not here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..schedule import FORWARD, INPUT, WEIGHT, Schedule, assemble, ordered
from .single import expect_one_chunk, in_turn


def zb_h1(num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """1F1B whose rank r puts weight gradients off by r micro-batches, so that each has as many unfinished."""
    expect_one_chunk("zb-h1", num_chunks)
    passes = dict.fromkeys((FORWARD, INPUT, WEIGHT), in_turn(num_micro_batches))
    orders = [ordered(_kinds(num_ranks, num_micro_batches, rank), passes) for rank in range(num_ranks)]
    return assemble("zb-h1", orders, num_micro_batches=num_micro_batches)


def _kinds(num_ranks: int, num_micro_batches: int, rank: int) -> NDArray[np.int8]:
    warm_up, put_off = min(num_ranks - 1 - rank, num_micro_batches), min(rank, num_micro_batches)
    units = np.tile(np.array([FORWARD, INPUT, WEIGHT], np.int8), (num_micro_batches, 1))
    there = np.ones(units.shape, bool)
    there[num_micro_batches - warm_up :, 0] = False
    there[:put_off, 2] = False
    return np.concatenate([np.full(warm_up, FORWARD), units[there], np.full(put_off, WEIGHT)], dtype=np.int8)
