"""Interleaved 1F1B: several chunks of the model per rank (Megatron-LM, arXiv 2104.04473, section 2.2.2)."""

from __future__ import annotations

import numpy as np

from ..schedule import BACKWARD, FORWARD, Schedule, assemble, ordered
from .single import alternating


def interleaved(num_ranks: int, num_micro_batches: int, num_chunks: int = 2) -> Schedule:
    """Micro-batches go in rounds of `num_ranks` through chunk after chunk; backwards through the chunks backwards.

    Raises ValueError unless micro-batches are a multiple of ranks, and chunks 2 or more.
    """
    if num_chunks < 2:
        raise ValueError(f"interleaved: {num_chunks} chunks per rank; use 2 or more, or the schedule `1f1b`")
    over = num_micro_batches % num_ranks
    if over:
        fewer, more = num_micro_batches - over, num_micro_batches - over + num_ranks
        nearest = fewer if fewer and over <= num_ranks / 2 else more
        raise ValueError(
            f"interleaved: {num_micro_batches} micro-batches on {num_ranks} ranks; use a multiple of {num_ranks}, "
            f"the nearest is {nearest}"
        )
    num_passes = num_micro_batches * num_chunks
    rounds, places = np.divmod(np.arange(num_passes, dtype=np.int32), num_ranks * num_chunks)
    chunks, within = np.divmod(places, num_ranks)
    micro_batches, chunks = rounds * num_ranks + within, chunks.astype(np.int16)
    passes = {FORWARD: (micro_batches, chunks), BACKWARD: (micro_batches, num_chunks - 1 - chunks)}
    orders = [
        ordered(alternating(num_passes, warm_up=(num_chunks - 1) * num_ranks + 2 * (num_ranks - 1 - rank)), passes)
        for rank in range(num_ranks)
    ]
    return assemble("interleaved", orders, num_micro_batches=num_micro_batches, num_chunks=num_chunks)
