"""The routing decision as one value: made by the router, read by every later stage, recomputed by none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

KEPT, FILLED, RECTIFIED, DROPPED, SPARE = range(5)
"""What became of a choice: it got a slot; a fill-in choice got one that would have been padding; a local expert
stands in for it; nobody does; a fill-in choice found no empty slot (and costs nothing)."""


@dataclass(frozen=True)
class StandIns:
    """Local experts in place of lost choices (intra-GPU rectification, METHODS R6, R9)."""

    expert_T: Tensor
    """int64: the token's stand-in, one of the experts of its own (emulated) rank; -1 where it has none."""
    weight_T: Tensor
    """fp32 (or wider): combine weight of its row, with gradient; 0 where it has no row."""
    slots_T: Tensor
    """int64: place among the stand-in rows of (block, expert); -1: no row. A stand-in that holds the token in a
    slot already needs none: the slot's weight carries both."""
    counts_BE: Tensor
    """int64: stand-in rows per block and expert."""
    bound: int | None
    """Most rows of a block; None: no bound."""


@dataclass(frozen=True)
class Routing:
    """What became of every choice of the T tokens of this rank. Legend of suffixes: `moe/__init__.py`.

    K choices per token: the first `top_k` are the router's, those after them fill slots that would be padding.
    """

    experts_TK: Tensor
    """int64: chosen experts, best first."""
    weights_TK: Tensor
    """fp32 (or wider): combine weight of each choice, 0 where it has no slot; carries the router's gradient."""
    slots_TK: Tensor
    """int64: place in the queue of (block, expert); -1: none."""
    counts_BE: Tensor
    """int64: slots taken per block and expert; what dispatch sends."""
    capacity: int | None
    """Slots per (block, expert); None: dropless."""
    logits_TE: Tensor
    """fp32 (or wider) router logits, with gradient: z-loss reads them."""
    probs_TE: Tensor
    """fp32 (or wider) scores that sum to one over the experts, with gradient: the balance loss reads them."""
    top_k: int
    next_TJ: Tensor | None = None
    """int64: the next-best experts beyond the choices, best first; what fill-in draws from."""
    priority_T: Tensor | None = None
    """int32: who gets a slot first (R3); None: there is one for everybody."""
    stand_ins: StandIns | None = None

    @property
    def num_tokens(self) -> int:
        return self.experts_TK.size(0)

    @property
    def num_experts(self) -> int:
        return self.probs_TE.size(1)

    @property
    def num_blocks(self) -> int:
        """Source ranks this routing stands for: 1, or more when ranks are emulated (METHODS R10)."""
        return self.counts_BE.size(0)

    @cached_property
    def block_T(self) -> Tensor:
        """int64: the block that each token belongs to; blocks are equal and consecutive."""
        return block_of(self.num_tokens, self.num_blocks, self.experts_TK.device)

    @cached_property
    def load_E(self) -> Tensor:
        """int64: the router's choices per expert before any was dropped; fill-in choices do not count (R8)."""
        first = self.experts_TK[:, : self.top_k].reshape(-1)
        return count_of(first, self.num_experts)

    @cached_property
    def kinds_TK(self) -> Tensor:
        """int64: KEPT, FILLED, RECTIFIED, DROPPED or SPARE."""
        T, K = self.experts_TK.shape
        rank_K = torch.arange(K, device=self.experts_TK.device)
        has_slot_TK = self.slots_TK >= 0
        lost_T1 = torch.full((T, 1), DROPPED, device=self.experts_TK.device)
        if self.stand_ins is not None:
            lost_T1 = torch.where(self.stand_ins.expert_T >= 0, RECTIFIED, DROPPED).unsqueeze(1)
        first_TK = torch.where(has_slot_TK, KEPT, lost_T1)
        return torch.where(rank_K < self.top_k, first_TK, torch.where(has_slot_TK, FILLED, SPARE))


def block_of(tokens: int, blocks: int, device: torch.device) -> Tensor:
    """int64 [T]: which of `blocks` equal consecutive blocks each token belongs to."""
    return torch.arange(tokens, device=device).div(max(1, tokens // blocks), rounding_mode="floor")


def count_of(values: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 occurs in `values` (int64, any shape): bincount without host synchronisation."""
    flat = values.reshape(-1)
    return torch.zeros(size, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
