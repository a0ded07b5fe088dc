"""Rectify-Router (METHODS R5-R7, R9; arXiv 2402.12399): lost choices served locally, empty slots filled.

Pure functions from one `Routing` to another; the router, the dispatcher and the experts know nothing of them.

    fill_in       slots that would be padding take tokens' next-best choices
    intra_gpu     tokens that lost choices go to the best expert of their own rank, which costs no communication
    Rectifier     what a layer holds: both, fill-in first (R7)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.route import assign
from .config import EmulateConfig, RouterConfig
from .routing import Routing, StandIns
from .weights import combine_weights, weights_with_stand_in


@dataclass(frozen=True)
class OwnExperts:
    """Which experts belong to the rank that each block of tokens stands for: consecutive, as many everywhere."""

    source: int
    """The rank that the first block stands for; each further block stands for the next rank."""
    owners: int
    """Rank s owns share s mod `owners` of all experts."""
    count: int
    """Experts of a share."""

    def first_B(self, blocks: int, device: torch.device) -> Tensor:
        """int64: the first expert of each block's rank."""
        # Computed there: numbers of the host would be copied to the device, and waited for.
        return (torch.arange(blocks, device=device) + self.source) % self.owners * self.count

    def within(self, held: range, blocks: int) -> bool:
        """Whether those of all blocks are among the experts `held` by this rank."""
        firsts = ((self.source + block) % self.owners * self.count for block in range(blocks))
        return all(held.start <= first and first + self.count <= held.stop for first in firsts)


def own_experts(num_experts: int, held: range, blocks: int, rank: int, emulate: EmulateConfig | None) -> OwnExperts:
    """Whose experts stand in for the tokens of each of this rank's `blocks` (R10).

    num_experts: of all ranks; held: those of this rank; rank: of the world, whose tokens are in global order.
    Without `emulate` a rank is one block, its own.
    """
    if emulate is None:
        return OwnExperts(held.start // len(held), num_experts // len(held), len(held))
    return OwnExperts(rank * blocks, emulate.owners, num_experts // emulate.owners)


@dataclass(frozen=True)
class Rectifier:
    """What one layer does to each of its routings: `config.rectify`, with the experts of its rank."""

    config: RouterConfig
    own: OwnExperts
    travels: bool = False
    """Whether stand-ins may be on other ranks: emulated ranks that own what this one does not hold."""
    backend: Backend = "auto"

    def __call__(self, routing: Routing) -> Routing:
        if self.config.rectify.fill:
            routing = fill_in(routing, self.config, self.backend)
        if self.config.rectify.intra:
            routing = intra_gpu(routing, self.config, self.own, self.backend)
        return routing


def fill_in(routing: Routing, config: RouterConfig, backend: Backend = "auto") -> Routing:
    """Adds each token's next-best experts as choices that queue after all others (R5).

    They take only slots that would be padding, in the order of R3. `routing` is one with a capacity and with
    `next_TJ`; all its choices keep what they have, only the weights are shared anew (R4).
    """
    next_TJ, priority_T, capacity = routing.next_TJ, routing.priority_T, routing.capacity
    assert next_TJ is not None and priority_T is not None and capacity is not None
    E, B = routing.num_experts, routing.num_blocks
    queued_TJ, queued_BE = assign(next_TJ, priority_T, E, B, capacity, backend)
    # The queue goes on behind those who are in it.
    slots_TJ = queued_TJ + routing.counts_BE[routing.block_T.unsqueeze(1), next_TJ]
    slots_TJ = slots_TJ.masked_fill((queued_TJ < 0) | (slots_TJ >= capacity), -1)
    experts_TK = torch.cat([routing.experts_TK, next_TJ], 1)
    slots_TK = torch.cat([routing.slots_TK, slots_TJ], 1)
    weights_TK = combine_weights(routing.logits_TE, experts_TK, slots_TK, config, backend)
    return replace(
        routing,
        experts_TK=experts_TK,
        slots_TK=slots_TK,
        counts_BE=(routing.counts_BE + queued_BE).clamp(max=capacity),
        weights_TK=weights_TK,
        next_TJ=None,
    )


def intra_gpu(routing: Routing, config: RouterConfig, own: OwnExperts, backend: Backend = "auto") -> Routing:
    """Lets the best expert of the token's own rank stand in for the choices it lost (R6).

    Tokens with fewer than top_k survivors are selected (`select: any`), or those with none (`all`). With
    `rectify.capacity` at most that part of a block's tokens get a row (R9): those without any expert first, then
    in the order of R3. All others keep their weights bit for bit.

    Deviation (ours): where the stand-in already holds the token in a slot, its weight is added to the slot's, and
    no row is computed twice.
    """
    T, K = routing.experts_TK.shape
    E, B, device = routing.num_experts, routing.num_blocks, routing.experts_TK.device
    block_T = routing.block_T
    first_T1 = own.first_B(B, device)[block_T].unsqueeze(1)
    own_Tn = first_T1 + torch.arange(own.count, device=device)
    local_T = first_T1.squeeze(1) + routing.logits_TE.detach().gather(1, own_Tn).argmax(1)
    has_slot_TK = routing.slots_TK >= 0
    survivors_T = has_slot_TK.sum(1)
    selected_T = survivors_T < (routing.top_k if config.rectify.select == "any" else 1)
    holds_TK = has_slot_TK & (routing.experts_TK == local_T.unsqueeze(1))
    needs_row_T = selected_T & ~holds_TK.any(1)
    bound = rows_bound(config.rectify.capacity, T // B)
    if bound is not None:
        needs_row_T = needs_row_T & _within_bound(needs_row_T, survivors_T == 0, routing, bound)
        selected_T = needs_row_T | (selected_T & holds_TK.any(1))
    # A queue of their own for tokens without a row; who is where in a queue carries no meaning.
    queue_T1 = torch.where(needs_row_T, local_T, E).unsqueeze(1)
    slots_T1, counts_BE = assign(queue_T1, None, E + 1, B, None, backend)

    experts_TL = torch.cat([routing.experts_TK, local_T.unsqueeze(1)], 1)
    # Values for tokens that lost nothing mean nothing.
    times_TL = torch.cat([has_slot_TK, (K - survivors_T).clamp(min=1).unsqueeze(1)], 1)
    weights_TL = weights_with_stand_in(routing.logits_TE, experts_TL, times_TL, config, backend)
    weights_TK, weight_T = weights_TL[:, :K], weights_TL[:, K]
    weights_TK = weights_TK + torch.where(holds_TK, weight_T.unsqueeze(1), torch.zeros_like(weights_TK))
    stand_ins = StandIns(
        expert_T=torch.where(selected_T, local_T, -1),
        weight_T=torch.where(needs_row_T, weight_T, torch.zeros_like(weight_T)),
        slots_T=torch.where(needs_row_T, slots_T1.squeeze(1), -1),
        counts_BE=counts_BE[:, :E],
        bound=bound,
    )
    weights_TK = torch.where(selected_T.unsqueeze(1), weights_TK, routing.weights_TK)
    return replace(routing, weights_TK=weights_TK, stand_ins=stand_ins)


def rows_bound(capacity: float | None, tokens: int) -> int | None:
    """Most stand-in rows of a rank with `tokens` tokens (R9)."""
    return None if capacity is None else min(tokens, math.ceil(Fraction(str(capacity)) * tokens))


def _within_bound(needs_row_T: Tensor, unserved_T: Tensor, routing: Routing, bound: int) -> Tensor:
    """Which tokens are among the first `bound` of their block: those that need a row, unserved ones first, then R3."""
    assert routing.priority_T is not None
    B = routing.num_blocks
    key_T = (needs_row_T.long() << 33) + (unserved_T.long() << 32) + routing.priority_T
    order_Bs = key_T.view(B, -1).sort(dim=1, descending=True, stable=True).indices
    within_Bs = torch.zeros_like(order_Bs, dtype=torch.bool)
    return within_Bs.scatter_(1, order_Bs[:, :bound], True).view(-1)
