"""The order in which every rank of a pipeline does its work; how long that takes is `simulate`'s.

Ranks hold one or more chunks of the model; a stage is a chunk by its place in the model. Builders: `schedules/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

KINDS = "FBIW"
"""Forward; backward; or the backward split: gradient of the input, gradient of the weights."""
FORWARD, BACKWARD, INPUT, WEIGHT = range(len(KINDS))
NOTHING = -1
"""After a rank's last action, where other ranks have more."""


class Action(NamedTuple):
    """One pass of one micro-batch through one chunk of a rank."""

    kind: str
    """A letter of KINDS."""
    micro_batch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}.{self.chunk}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """What each rank does, in order: arrays [ranks, steps], NOTHING after a rank's last action."""

    name: str
    num_micro_batches: int
    num_chunks: int
    """Of the model, per rank."""
    placement: Literal["loop", "v"]
    """Of stages on ranks: `loop` starts at the first rank with every chunk, `v` comes back the way it went."""
    kinds: NDArray[np.int8]
    """Places in KINDS."""
    micro_batches: NDArray[np.int32]
    chunks: NDArray[np.int16]
    beside_next: NDArray[np.bool_]
    """Whether an action runs beside the one after it: the communication of one under the compute of the other."""

    @property
    def num_ranks(self) -> int:
        """Of the pipeline."""
        return self.kinds.shape[0]

    @property
    def num_stages(self) -> int:
        """Chunks of the whole model."""
        return self.num_ranks * self.num_chunks

    @cached_property
    def stages(self) -> NDArray[np.int64]:
        """Stage of each rank's chunk, [ranks, chunks]."""
        ranks, chunks = np.arange(self.num_ranks)[:, None], np.arange(self.num_chunks)[None]
        back = (self.placement == "v") & (chunks % 2 == 1)
        return chunks * self.num_ranks + np.where(back, self.num_ranks - 1 - ranks, ranks)

    @cached_property
    def rank_of_stage(self) -> NDArray[np.int64]:
        """Rank that holds each stage."""
        found = np.empty(self.num_stages, np.int64)
        found[self.stages.T] = np.arange(self.num_ranks)
        return found

    @cached_property
    def num_actions(self) -> NDArray[np.int64]:
        """Of each rank."""
        return (self.kinds != NOTHING).sum(axis=1)

    def actions(self, rank: int) -> list[Action]:
        """What `rank` does, in order."""
        many = slice(0, int(self.num_actions[rank]))
        columns = (self.kinds[rank, many], self.micro_batches[rank, many], self.chunks[rank, many])
        return [Action(KINDS[kind], int(m), int(chunk)) for kind, m, chunk in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Order:
    """One rank's actions, in order, as arrays of one length."""

    kinds: NDArray[np.int8]
    micro_batches: NDArray[np.int32]
    chunks: NDArray[np.int16]
    beside_next: NDArray[np.bool_]


Passes = tuple[NDArray[np.int32], NDArray[np.int16]]
"""Micro-batch and chunk of all passes of one kind, in order."""


def ordered(kinds: NDArray[np.int8], passes: Mapping[int, Passes]) -> Order:
    """The order whose n-th action of a kind is that kind's n-th pass; nothing runs beside anything."""
    micro_batches, chunks = np.empty(len(kinds), np.int32), np.empty(len(kinds), np.int16)
    for kind, (of_kind, chunks_of_kind) in passes.items():
        at = kinds == kind
        micro_batches[at], chunks[at] = of_kind, chunks_of_kind
    return Order(kinds, micro_batches, chunks, np.zeros(len(kinds), bool))


def assemble(
    name: str,
    orders: Sequence[Order],
    *,
    num_micro_batches: int,
    num_chunks: int = 1,
    placement: Literal["loop", "v"] = "loop",
) -> Schedule:
    """A schedule of one order for each rank."""
    shape = len(orders), max(len(order.kinds) for order in orders)
    kinds, chunks = np.full(shape, NOTHING, np.int8), np.zeros(shape, np.int16)
    micro_batches, beside_next = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for rank, order in enumerate(orders):
        many = len(order.kinds)
        kinds[rank, :many], chunks[rank, :many] = order.kinds, order.chunks
        micro_batches[rank, :many], beside_next[rank, :many] = order.micro_batches, order.beside_next
    return Schedule(
        name=name,
        num_micro_batches=num_micro_batches,
        num_chunks=num_chunks,
        placement=placement,
        kinds=kinds,
        micro_batches=micro_batches,
        chunks=chunks,
        beside_next=beside_next,
    )
