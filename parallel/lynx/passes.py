"""How long each pass of a rank takes, and what of that is compute, recomputation and communication.

Inside a pass, recomputation comes first, then compute, then the communication that it stands still for: in a real pass
they alternate by layer. Communication beside compute starts with the pass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pipeline_work import ChunkWork, PipelineWork
from .schedule import BACKWARD, FORWARD, INPUT, KINDS, NOTHING, WEIGHT, Schedule


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds of passes, in arrays of one shape."""

    total: NDArray[np.float64]
    """Without waiting; of a backward, with the recomputation that may run before its gradient is there."""
    compute: NDArray[np.float64]
    recompute: NDArray[np.float64]
    """Recomputation that nothing hides."""
    early: NDArray[np.float64]
    """Recomputation before the gradient is there: hidden as far as the rank waits for that."""
    exposed: NDArray[np.float64]
    """Communication that the rank stands still for, but for hidden recomputation."""
    communication: NDArray[np.float64]
    """All of it, exposed or not."""
    hidden: NDArray[np.float64]
    """Recomputation under communication: no part of the total."""

    def at(self, index: Any) -> Parts:
        """Of the passes at `index`."""
        return Parts(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Passes:
    """The passes of a schedule: each action has a code, by which what it takes is found.

    A code stands for one rank's single passes of one kind, or its pairs, through one chunk, or two.
    """

    codes: NDArray[np.int32]
    """[ranks, steps]; a pair's first action has the pair's code, its second that of the pass alone."""
    second: NDArray[np.bool_]
    """Which actions run beside the one before them, [ranks, steps]."""
    there: NDArray[np.bool_]
    """Which actions there are, [ranks, steps]."""
    parts: Parts
    """By code."""
    rank: NDArray[np.int64]
    """By code."""
    send_seconds: NDArray[np.float64]
    """Of what a pass sends to another rank, by code; of a pair, of what its first sends."""
    send_bytes: NDArray[np.int64]
    link: NDArray[np.int64]
    """On which it is sent, by code: three of each rank, to the next, to the one before, and to itself."""

    def of(self, rank: int, since: int = 0) -> Parts:
        """Of each action of `rank` from number `since` on; a pair's second takes nothing beside its first."""
        mine = slice(since, int(self.there[rank].sum()))
        found = self.parts.at(self.codes[rank, mine])
        for field in fields(found):
            getattr(found, field.name)[self.second[rank, mine]] = 0.0
        return found

    def total_of(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over each rank's actions of `seconds`, which is by code; [ranks]."""
        counts = np.bincount(self.codes[self.there & ~self.second], minlength=len(seconds))
        found = np.zeros(len(self.codes))
        np.add.at(found, self.rank, counts * seconds)
        return found


def passes(schedule: Schedule, work: PipelineWork) -> Passes:
    """The passes of `schedule`, taking `work`."""
    num_ranks, num_chunks = schedule.num_ranks, schedule.num_chunks
    single = _single_parts(schedule, work)
    pair = _pair_parts(single, work.pair_speed)
    ranks = np.arange(num_ranks)
    codes = ((ranks[:, None] * num_chunks + schedule.chunks) * len(KINDS) + schedule.kinds).astype(np.int32)
    second = np.zeros_like(schedule.beside_next)
    second[:, 1:] = schedule.beside_next[:, :-1]
    at = np.nonzero(schedule.beside_next)
    pairs_before = (at[0] * num_chunks + schedule.chunks[at]) * num_chunks + schedule.chunks[at[0], at[1] + 1]
    codes[at] = single.total.size + pairs_before
    seconds, num_bytes, way = _sends(schedule, work)
    ways = 3 * ranks[:, None, None] + way

    def by_code(of_single: NDArray[Any]) -> NDArray[Any]:
        of_pair = np.broadcast_to(of_single[:, :, FORWARD, None], pair.total.shape)
        return np.concatenate([of_single.ravel(), of_pair.ravel()])

    joined = {f.name: np.concatenate([getattr(each, f.name).ravel() for each in (single, pair)]) for f in fields(Parts)}
    return Passes(
        codes=codes,
        second=second,
        there=schedule.kinds != NOTHING,
        parts=Parts(**joined),
        rank=by_code(ways) // 3,
        send_seconds=by_code(seconds),
        send_bytes=by_code(num_bytes),
        link=by_code(ways),
    )


def _single_parts(schedule: Schedule, work: PipelineWork) -> Parts:
    """Of every pass alone, [ranks, chunks, kinds]."""
    shape = schedule.num_ranks, schedule.num_chunks, len(KINDS)
    found = Parts(**{field.name: np.zeros(shape) for field in fields(Parts)})
    # Ranks are mostly alike.
    known: dict[ChunkWork, list[dict[str, float]]] = {}
    for rank, of_rank in enumerate(work.ranks):
        for chunk, of_chunk in enumerate(of_rank.chunks):
            if of_chunk not in known:
                known[of_chunk] = [_of_pass(of_chunk, kind) for kind in range(len(KINDS))]
            for kind, parts in enumerate(known[of_chunk]):
                for name, seconds in parts.items():
                    getattr(found, name)[rank, chunk, kind] = seconds
    return found


def _of_pass(work: ChunkWork, kind: int) -> dict[str, float]:
    if kind == WEIGHT:
        return {"total": work.weight_seconds, "compute": work.weight_seconds}
    if kind == FORWARD:
        compute, recompute, early = work.forward_seconds, 0.0, 0.0
        waits, beside = work.forward_exposed_seconds, work.forward_beside_seconds
        hidden = work.forward_hidden_seconds
    else:
        compute = work.input_seconds + (work.weight_seconds if kind == BACKWARD else 0.0)
        recompute, early = work.recompute_seconds, work.early_recompute_seconds
        waits, beside = work.backward_exposed_seconds, work.backward_beside_seconds
        hidden = work.backward_hidden_seconds
    # What runs beside is exposed as far as it outlasts the compute.
    exposed = waits + max(0.0, beside - recompute - compute)
    return {
        "total": early + recompute + compute + exposed,
        "compute": compute,
        "recompute": recompute,
        "early": early,
        "exposed": exposed,
        "communication": waits + beside,
        "hidden": hidden,
    }


def _pair_parts(single: Parts, speed: float) -> Parts:
    """Of a forward through one chunk beside a backward through another, [ranks, forward's chunk, backward's chunk].

    One computes while the other communicates, at `speed`, as long as both last; neither is faster than alone. This is
    the most that there is to gain: layers of both would have to be in step. Recomputation that hid under communication
    is compute like other compute here.
    """
    f, b = single.at((slice(None), slice(None), None, FORWARD)), single.at((slice(None), None, slice(None), BACKWARD))
    compute = f.compute + b.compute
    recompute = b.recompute + b.early + f.hidden + b.hidden
    communication = f.communication + b.communication
    busy = compute + recompute
    slower = (1 - speed) * np.minimum(communication, busy / speed)
    alone = np.maximum(f.total, b.total)
    total = np.maximum(np.maximum(busy + slower, communication), alone)
    none = np.zeros_like(total)
    return Parts(
        total=total,
        compute=compute,
        recompute=recompute,
        early=none,
        exposed=total - busy,
        communication=communication,
        hidden=none,
    )


def _sends(schedule: Schedule, work: PipelineWork) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Seconds, bytes and way of what passes send, [ranks, chunks, kinds]; none at the model's ends and a V's turn.

    Ways: 0 to the next rank, 1 to the one before, 2 to none.
    """
    shape = schedule.num_ranks, schedule.num_chunks, len(KINDS)
    seconds, num_bytes, way = np.zeros(shape), np.zeros(shape, np.int64), np.full(shape, 2)
    for rank, of_rank in enumerate(work.ranks):
        for chunk, of_chunk in enumerate(of_rank.chunks):
            stage = int(schedule.stages[rank, chunk])
            back = schedule.placement == "v" and chunk % 2 == 1
            for kinds, to, message, goes_back in (
                ([FORWARD], stage + 1, of_chunk.output, back),
                ([BACKWARD, INPUT], stage - 1, of_chunk.gradient, not back),
            ):
                if 0 <= to < schedule.num_stages and schedule.rank_of_stage[to] != rank:
                    seconds[rank, chunk, kinds] = message.seconds
                    num_bytes[rank, chunk, kinds] = message.bytes
                    way[rank, chunk, kinds] = int(goes_back)
    return seconds, num_bytes, way
