"""DualPipeV: two chunks per rank, placed in a V; the all-to-alls of one micro-batch run under another's compute.

DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1) cut in half by Sea AI Lab, so that every chunk is there once.
"""

from __future__ import annotations

import numpy as np

from ..schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Order, Schedule, assemble

F0, B0, I0 = ((kind, 0) for kind in (FORWARD, BACKWARD, INPUT))
F1, B1, I1 = ((kind, 1) for kind in (FORWARD, BACKWARD, INPUT))
W = (WEIGHT, 0)
"""Its chunk and micro-batch are those of the oldest input gradient that has none."""


def dualpipev(num_ranks: int, num_micro_batches: int, num_chunks: int = 2) -> Schedule:
    """The eight steps of DualPipeV, as in torch and in DeepSeek's repository.

    Raises ValueError unless there are 2 chunks per rank and as many micro-batches as stages, or more.
    """
    if num_chunks != 2:
        raise ValueError(f"dualpipev: {num_chunks} chunks per rank; it has 2: use 2")
    if num_micro_batches < 2 * num_ranks:
        raise ValueError(
            f"dualpipev: {num_micro_batches} micro-batches for {2 * num_ranks} stages; use {2 * num_ranks} or more"
        )
    orders = [_order(num_ranks, num_micro_batches, rank) for rank in range(num_ranks)]
    return assemble("dualpipev", orders, num_micro_batches=num_micro_batches, num_chunks=2, placement="v")


def _order(num_ranks: int, num_micro_batches: int, rank: int) -> Order:
    after, upto = num_ranks - 1 - rank, rank + 1
    main = num_micro_batches - 2 * num_ranks + upto
    # 1-3: warm-up.
    steps = [F0] * (2 * after) + [F0, F1] * upto + [I1, W, F1] * after
    beside = [False] * len(steps)
    # 4: forward of one chunk beside backward of the other; the turn of the V does not wait for its first pair.
    steps += [F0, B1, F1, B0] * main
    beside += [True, False, True, False] * main
    if after == 0:
        beside[-4 * main] = False
    # 5: no forward of chunk 0 is left.
    steps += [B1, F1, B0] * after
    beside += [False, True, False] * after
    # 6: backwards only, the later half without their weight gradients.
    late = [B1, B0] * (upto // 2) + ([B1, I0] if upto % 2 else []) + [I1, I0] * (upto // 2)
    # 7-8: those between and after the last backwards.
    late += [W, I0] * after + [W] * upto
    steps += late
    beside += [False] * len(late)
    return _numbered(steps, beside)


def _numbered(steps: list[tuple[int, int]], beside: list[bool]) -> Order:
    """Each pass of a chunk takes its next micro-batch."""
    kinds, chunks = np.array(steps, np.int16).T
    micro_batches = np.empty(len(steps), np.int32)
    for chunk in (0, 1):
        for of_kinds in ((FORWARD,), (BACKWARD, INPUT)):
            at = np.isin(kinds, of_kinds) & (chunks == chunk)
            micro_batches[at] = np.arange(at.sum())
    split, weights = kinds == INPUT, kinds == WEIGHT
    chunks[weights], micro_batches[weights] = chunks[split], micro_batches[split]
    return Order(kinds.astype(np.int8), micro_batches, chunks, np.array(beside, bool))
