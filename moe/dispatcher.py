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

import torch
from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.combine import combine
from ..kernels.dispatch import permute, reorder
from ..parallel.collectives import Exchange, Splits, all_gather_rows, start_all_to_all
from ..parallel.expert import local_experts
from ..parallel.mesh import Mesh
from .routing import Routing


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


class Dispatcher:
    """Expert-parallel exchange of one layer over `mesh.expert`; on one rank everything stays local.

    `ragged` sends the rows there are. `padded` sends all C slots of every (block, expert): its shapes depend on
    nothing but T, so it never synchronises with the host; it needs a routing with a capacity.
    """

    def __init__(
        self,
        num_experts: int,
        mesh: Mesh,
        dispatch: str = "ragged",
        piece_bytes: int = 0,
        backend: Backend = "auto",
    ) -> None:
        self.num_experts, self.mesh, self.padded = num_experts, mesh, dispatch == "padded"
        self.piece_bytes = piece_bytes
        self.backend: Backend = backend
        self.local = local_experts(num_experts, mesh.expert)

    def plan(self, routing: Routing, row_bytes: int) -> DispatchHandle:
        """Lays out the rows of `routing`; `row_bytes` is the size of one, for cutting the exchange."""
        padded = self.padded and routing.capacity is not None
        B, E, device = routing.num_blocks, routing.num_experts, routing.slots_TK.device
        if padded:
            counts_EB = torch.full((E, B), routing.capacity or 0, dtype=torch.int64, device=device)
        else:
            counts_EB = routing.counts_BE.t().contiguous()
        position_TK, source_N = self._rows(routing, counts_EB, padded)
        dropless = routing.capacity is None
        axis = self.mesh.expert
        if axis.group is None:
            offsets_e = counts_EB.sum(1).cumsum(0).to(torch.int32)
            splits = Splits([source_N.numel()], [source_N.numel()])
            return DispatchHandle(position_TK, source_N, not dropless, splits, None, None, offsets_e)
        counts_E = counts_EB.sum(1)
        if padded:
            counts_GE = counts_E.expand(axis.size, E)
            per_rank = (routing.capacity or 0) * B * len(self.local)
            pair_rows = [[per_rank] * axis.size] * axis.size
        else:
            counts_GE = all_gather_rows(counts_E, axis, "dispatch-counts", self.mesh.recorder)
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
        offsets_e = counts_Ge.sum(0).cumsum(0).to(torch.int32)
        return DispatchHandle(position_TK, source_N, not dropless, splits, order_R, inverse_R, offsets_e)

    def _rows(self, routing: Routing, counts_EB: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
        """Row of every choice, and token of every row: rows by expert, then block, then slot."""
        T, K = routing.slots_TK.shape
        device = routing.slots_TK.device
        start_EB = (counts_EB.reshape(-1).cumsum(0) - counts_EB.reshape(-1)).view_as(counts_EB)
        block_T1 = torch.arange(T, device=device).div(T // routing.num_blocks, rounding_mode="floor").unsqueeze(1)
        kept_TK = routing.slots_TK >= 0
        position_TK = start_EB[routing.experts_TK, block_T1] + routing.slots_TK
        position_TK = torch.where(kept_TK, position_TK, -1)
        if padded:
            num_rows = counts_EB.numel() * (routing.capacity or 0)
        elif routing.capacity is None:
            num_rows = T * K
        else:
            num_rows = int(counts_EB.sum())
        token_TK = torch.arange(T, device=device).unsqueeze(1).expand(T, K)
        source = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=device)
        # Dropped choices write to a spare last cell.
        source.scatter_(0, torch.where(kept_TK, position_TK, num_rows).reshape(-1), token_TK.reshape(-1))
        return position_TK, source[:num_rows]

    def start_dispatch(self, x_TD: Tensor, handle: DispatchHandle) -> Exchange:
        """Tokens become rows by expert and leave for the experts' ranks."""
        rows_ND = permute(x_TD, handle.source_N, handle.position_TK, handle.may_be_empty, self.backend)
        return start_all_to_all(rows_ND, handle.splits, self.mesh.expert, "dispatch", self.mesh.recorder)

    def finish_dispatch(self, exchange: Exchange, handle: DispatchHandle) -> Tensor:
        """Waits for the rows and sorts them by this rank's experts; [R, D]."""
        rows_RD = exchange.wait()
        if handle.order_R is None or handle.inverse_R is None:
            return rows_RD
        return reorder(rows_RD, handle.order_R, handle.inverse_R, self.backend)

    def start_combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Exchange:
        """Expert outputs leave for the ranks of their tokens."""
        if handle.order_R is not None and handle.inverse_R is not None:
            rows_RD = reorder(rows_RD, handle.inverse_R, handle.order_R, self.backend)
        back = handle.splits.reversed()
        return start_all_to_all(rows_RD, back, self.mesh.expert, "combine", self.mesh.recorder)

    def finish_combine(self, exchange: Exchange, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        """Waits for the outputs; each token's weighted sum [T, D]."""
        rows_ND = exchange.wait()
        return combine(rows_ND, weights_TK, handle.position_TK, handle.source_N, handle.may_be_empty, self.backend)
