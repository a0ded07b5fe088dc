"""Tokens to the ranks of their experts and back, in steps that either compute or communicate, never both.

    plan            which row goes where; exchanges counts                    local + small collective
    start_dispatch  tokens into rows by expert, rows on their way             local, then starts to communicate
    finish_dispatch rows arrived, sorted by this rank's experts               waits, then local
    start_combine   expert outputs on their way back                          local, then starts to communicate
    finish_combine  outputs arrived, weighted and summed per token            waits, then local

Whatever runs between a start and its finish overlaps with the exchange, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.combine import combine
from ..kernels.dispatch import permute, reorder
from ..parallel.collectives import Exchange, Splits, all_gather_rows, start_all_to_all
from ..parallel.expert import local_experts
from ..parallel.mesh import Mesh
from ..parallel.recompute import PLAIN, Calls
from .routing import Routing, StandIns, block_of


@dataclass(frozen=True)
class LocalRows:
    """Rows that never leave this rank: stand-ins of intra-GPU rectification. L rows."""

    position_T1: Tensor
    """int64: row of each token; -1: none."""
    source_L: Tensor
    """int64: token of each row; -1: padding."""
    offsets_e: Tensor
    """int32: row after the last of each local expert."""
    weight_T1: Tensor


@dataclass(frozen=True)
class DispatchHandle:
    """What dispatch did, for combine to undo. N rows leave this rank, R arrive."""

    position_TK: Tensor
    """int64: row of each choice among the N; -1: dropped."""
    source_N: Tensor
    """int64: token of each row; -1: padding."""
    may_be_empty: bool
    """Whether either map holds a -1."""
    splits: Splits
    """Rows per rank of the expert axis."""
    order_R: Tensor | None
    """int64: arrived rows sorted by expert; None where they arrive sorted."""
    inverse_R: Tensor | None
    offsets_e: Tensor
    """int32: row after the last of each local expert, after sorting."""
    weights_TK: Tensor
    """Combine weight of each choice; here K counts stand-ins that travel with the choices."""
    local: LocalRows | None = None
    """Stand-ins that are computed apart, while the others travel."""


class Dispatcher:
    """Expert-parallel exchange of one layer over `mesh.expert`; on one rank everything stays local.

    `ragged` sends the rows there are. `padded` sends all C slots of every (block, expert): its shapes depend on
    nothing but T, so it never synchronises with the host, unless to ask how many stand-ins there are where
    `rectify.capacity` sets no bound; it needs a routing with a capacity.
    """

    def __init__(
        self,
        num_experts: int,
        mesh: Mesh,
        dispatch: str = "ragged",
        piece_bytes: int = 0,
        backend: Backend = "auto",
        name: str = "",
        calls: Calls = PLAIN,
    ) -> None:
        """`name` goes before the names of the collectives, say `layer3.`; `calls` computes what lies between them."""
        self._calls = calls
        self.num_experts, self.mesh, self.padded = num_experts, mesh, dispatch == "padded"
        self.piece_bytes, self.name = piece_bytes, name
        self.backend: Backend = backend
        self.local = local_experts(num_experts, mesh.expert)

    def plan(self, routing: Routing, row_bytes: int, stand_ins_travel: bool = False) -> DispatchHandle:
        """Lays out the rows of `routing`; `row_bytes` is the size of one, for cutting the exchange.

        Stand-ins are one more choice where that costs nothing: on one rank, in one call of the experts with all
        other rows. Elsewhere they stay out of the exchange and are computed while it lasts. `stand_ins_travel`:
        their experts may be on other ranks (emulated ones).
        """
        padded = self.padded and routing.capacity is not None
        experts_TK, slots_TK, weights_TK = routing.experts_TK, routing.slots_TK, routing.weights_TK
        counts_BE, local = routing.counts_BE, None
        stand_ins = routing.stand_ins
        if stand_ins is not None and not padded and (stand_ins_travel or self.mesh.expert.group is None):
            experts_TK, slots_TK, weights_TK, counts_BE = _with_stand_ins(routing, stand_ins)
        elif stand_ins is not None:
            local = self._local_rows(routing, stand_ins)
        B, E, device = routing.num_blocks, routing.num_experts, slots_TK.device
        if padded:
            counts_EB = torch.full((E, B), routing.capacity or 0, dtype=torch.int64, device=device)
        else:
            counts_EB = counts_BE.t().contiguous()
        if padded:
            num_rows = E * B * (routing.capacity or 0)
        elif routing.capacity is None:
            num_rows = slots_TK.numel()
        else:
            num_rows = int(counts_EB.sum())
        dropless = routing.capacity is None
        if dropless:
            position_TK, source_N = _all_rows(experts_TK, slots_TK, counts_EB)
        else:
            position_TK, source_N = _rows(experts_TK, slots_TK, counts_EB, num_rows)
        axis = self.mesh.expert
        if axis.group is None:
            offsets_e = counts_EB.sum(1).cumsum(0, dtype=torch.int32)
            splits = Splits([source_N.numel()], [source_N.numel()])
            return DispatchHandle(position_TK, source_N, not dropless, splits, None, None, offsets_e, weights_TK, local)
        counts_E = counts_EB.sum(1)
        if padded:
            counts_GE = counts_E.expand(axis.size, E)
            per_rank = (routing.capacity or 0) * B * len(self.local)
            pair_rows = [[per_rank] * axis.size] * axis.size
        else:
            counts_GE = all_gather_rows(counts_E, axis, f"{self.name}dispatch-counts", self.mesh.recorder)
            pair_rows = counts_GE.view(axis.size, axis.size, -1).sum(-1).tolist()  # [from][to], on the host
        largest = max(max(row) for row in pair_rows) * row_bytes
        pieces = max(1, -(-largest // self.piece_bytes)) if self.piece_bytes else 1
        receive = [row[axis.rank] for row in pair_rows]
        splits = Splits(pair_rows[axis.rank], receive, pieces)
        counts_Ge = counts_GE[:, self.local.start : self.local.stop]
        expert_R = torch.arange(len(self.local), device=device).expand(axis.size, -1).reshape(-1)
        expert_R = expert_R.repeat_interleave(counts_Ge.reshape(-1), output_size=sum(receive))
        order_R = expert_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(order_R.numel(), device=device)
        offsets_e = counts_Ge.sum(0).cumsum(0, dtype=torch.int32)
        return DispatchHandle(
            position_TK, source_N, not dropless, splits, order_R, inverse_R, offsets_e, weights_TK, local
        )

    def _local_rows(self, routing: Routing, stand_ins: StandIns) -> LocalRows | None:
        """Rows of the stand-ins, all of whose experts are on this rank; static in number under a bound (R9).

        None where no token needs one, so that the experts are not called for nothing.
        """
        counts_eB = stand_ins.counts_BE[:, self.local.start : self.local.stop].t().contiguous()
        expert_T1 = (stand_ins.expert_T - self.local.start).clamp(min=0).unsqueeze(1)
        if stand_ins.bound is None:
            num_rows = int(counts_eB.sum())
            if num_rows == 0:
                return None
        else:
            num_rows = stand_ins.bound * routing.num_blocks
        position_T1, source_L = _rows(expert_T1, stand_ins.slots_T.unsqueeze(1), counts_eB, num_rows)
        offsets_e = counts_eB.sum(1).cumsum(0, dtype=torch.int32)
        if stand_ins.bound is not None:
            # Empty rows go to the last expert, which makes nothing of them. To assign an item waits for the device.
            offsets_e[-1:].fill_(num_rows)
        return LocalRows(position_T1, source_L, offsets_e, stand_ins.weight_T.unsqueeze(1))

    def start_dispatch(self, x_TD: Tensor, handle: DispatchHandle) -> Exchange:
        """Tokens become rows by expert and leave for the experts' ranks."""
        rows_ND = self._permute(x_TD, handle.source_N, handle.position_TK, handle.may_be_empty)
        return self._start(rows_ND, handle.splits, "dispatch")

    def local_rows(self, x_TD: Tensor, local: LocalRows) -> Tensor:
        """Tokens become the rows that stay here, by expert; [L, D]."""
        return self._permute(x_TD, local.source_L, local.position_T1, True)

    def combine_local(self, rows_LD: Tensor, local: LocalRows) -> Tensor:
        """The stand-ins' part of each token's sum; [T, D]."""
        return self._combine(rows_LD, local.weight_T1, local.position_T1, local.source_L, True)

    def finish_dispatch(self, exchange: Exchange, handle: DispatchHandle) -> Tensor:
        """Waits for the rows and sorts them by this rank's experts; [R, D]."""
        return self._reorder("sort rows", exchange.wait(), handle.order_R, handle.inverse_R)

    def start_combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Exchange:
        """Expert outputs leave for the ranks of their tokens."""
        rows_RD = self._reorder("unsort rows", rows_RD, handle.inverse_R, handle.order_R)
        return self._start(rows_RD, handle.splits.reversed(), "combine")

    def finish_combine(self, exchange: Exchange, handle: DispatchHandle) -> Tensor:
        """Waits for the outputs; each token's weighted sum [T, D]."""
        maps = handle.position_TK, handle.source_N
        return self._combine(exchange.wait(), handle.weights_TK, *maps, handle.may_be_empty)

    def _start(self, rows: Tensor, splits: Splits, name: str) -> Exchange:
        windows = self._calls.windows
        during = windows(name, forward=True), windows(f"{name} gradient")
        return start_all_to_all(rows, splits, self.mesh.expert, f"{self.name}{name}", self.mesh.recorder, during)

    def _permute(self, *args: Any) -> Tensor:
        return self._calls.operator("permute", partial(permute, backend=self.backend), *args)

    def _combine(self, *args: Any) -> Tensor:
        return self._calls.operator("weighted sum", partial(combine, backend=self.backend), *args)

    def _reorder(self, name: str, rows_RD: Tensor, order_R: Tensor | None, inverse_R: Tensor | None) -> Tensor:
        if order_R is None or inverse_R is None:
            return rows_RD
        return self._calls.operator(name, partial(reorder, backend=self.backend), rows_RD, order_R, inverse_R)


def _with_stand_ins(routing: Routing, stand_ins: StandIns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts, slots, weights [T, K + 1] and counts [B, E] with the stand-in as the last choice, last in the queue."""
    taken_T = routing.counts_BE[routing.block_T, stand_ins.expert_T.clamp(min=0)]
    slots_T = torch.where(stand_ins.slots_T >= 0, stand_ins.slots_T + taken_T, -1)
    return (
        torch.cat([routing.experts_TK, stand_ins.expert_T.clamp(min=0).unsqueeze(1)], 1),
        torch.cat([routing.slots_TK, slots_T.unsqueeze(1)], 1),
        torch.cat([routing.weights_TK, stand_ins.weight_T.unsqueeze(1)], 1),
        routing.counts_BE + stand_ins.counts_BE,
    )


def _all_rows(experts_TK: Tensor, slots_TK: Tensor, counts_EB: Tensor) -> tuple[Tensor, Tensor]:
    """As `_rows` where every choice has a slot: rows and choices are a permutation of each other."""
    T, K = slots_TK.shape
    start_EB = counts_EB.reshape(-1).cumsum(0).sub_(counts_EB.reshape(-1)).view_as(counts_EB)
    if counts_EB.size(1) == 1:
        first_TK = start_EB.view(-1)[experts_TK]
    else:
        first_TK = start_EB[experts_TK, block_of(T, counts_EB.size(1), slots_TK.device).unsqueeze(1)]
    position_TK = first_TK.add_(slots_TK)
    token_N = torch.arange(T * K, device=slots_TK.device).div_(K, rounding_mode="floor")
    return position_TK, torch.empty_like(token_N).scatter_(0, position_TK.view(-1), token_N)


def _rows(experts_TK: Tensor, slots_TK: Tensor, counts_EB: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Row of every choice, and token of every row: rows by expert, then block, then slot."""
    T, K = slots_TK.shape
    start_EB = (counts_EB.reshape(-1).cumsum(0) - counts_EB.reshape(-1)).view_as(counts_EB)
    kept_TK = slots_TK >= 0
    block_T1 = block_of(T, counts_EB.size(1), slots_TK.device).unsqueeze(1)
    position_TK = torch.where(kept_TK, start_EB[experts_TK, block_T1] + slots_TK, -1)
    token_TK = torch.arange(T, device=slots_TK.device).unsqueeze(1).expand(T, K)
    source = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=slots_TK.device)
    # Choices without a slot write to a spare last cell.
    source.scatter_(0, torch.where(kept_TK, position_TK, num_rows).reshape(-1), token_TK.reshape(-1))
    return position_TK, source[:num_rows]
