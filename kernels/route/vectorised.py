"""Expert selection and slot assignment without a loop over blocks, tokens or experts."""

from __future__ import annotations

import torch
from torch import Tensor

_INDEX_BITS = 12


def _sortable(scores: Tensor) -> Tensor:
    """int64 that sort like fp32 `scores` and, among equals, by descending index: no two of a row are equal."""
    # Adding zero makes one of both zeros; negative numbers sort by their flipped bits.
    bits = (scores + 0.0).view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return bits.long().mul_(2**_INDEX_BITS).sub_(torch.arange(scores.size(-1), device=scores.device))


def _best(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dimension, best first, ties to the lower index."""
    if k == 1:
        return scores.argmax(-1, keepdim=True)
    if scores.dtype == torch.float32 and scores.size(-1) <= 2**_INDEX_BITS:
        return _sortable(scores).topk(k, -1).indices
    left = scores.clone()
    picks = []
    for _ in range(k):
        pick = left.argmax(-1, keepdim=True)
        left.scatter_(-1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, -1)


def select(scores_TE: Tensor, k: int, groups: int = 1, top_groups: int = 1) -> Tensor:
    """As `naive.select`; `scores_TE` must hold no -inf."""
    T, E = scores_TE.shape
    if groups > 1:
        grouped = scores_TE.view(T, groups, E // groups)
        kept = _best(grouped.topk(min(2, E // groups), -1).values.sum(-1), top_groups)
        barred = torch.ones(T, groups, dtype=torch.bool, device=scores_TE.device).scatter_(1, kept, False)
        # Finite, so that a barred expert still loses to none but never ties with one already picked.
        floor = torch.finfo(scores_TE.dtype).min
        scores_TE = grouped.masked_fill(barred.unsqueeze(-1), floor).view(T, E)
    return _best(scores_TE, k)


def assign_all(experts_TK: Tensor, num_experts: int, blocks: int) -> tuple[Tensor, Tensor]:
    """As `naive.assign` without a capacity, where the order inside a queue is free: that of tokens needs no copy."""
    key_N = experts_TK.reshape(-1)
    if blocks > 1:
        block_b1 = torch.arange(blocks, device=key_N.device).unsqueeze(1)
        key_N = (key_N.view(blocks, -1) + block_b1 * num_experts).view(-1)
    slot_N, counts = _queue(key_N, blocks * num_experts)
    return slot_N.view_as(experts_TK), counts.view(blocks, num_experts)


def assign(
    experts_TK: Tensor, priority_T: Tensor, num_experts: int, blocks: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """As `naive.assign`: one stable sort by (block, expert) of the queue in order of priority."""
    T, K = experts_TK.shape
    size, device = T // blocks, experts_TK.device
    order_bs = priority_T.view(blocks, size).sort(dim=-1, descending=True, stable=True).indices
    order_bsK = order_bs.unsqueeze(-1).expand(-1, -1, K)
    ordered_bsK = experts_TK.view(blocks, size, K).gather(1, order_bsK)
    block_b = torch.arange(blocks, device=device).view(blocks, 1, 1)
    key_N = (ordered_bsK + block_b * num_experts).transpose(1, 2).reshape(-1)  # [blocks, K, size]
    slot_N, wanted = _queue(key_N, blocks * num_experts)
    slots_bsK = slot_N.masked_fill_(slot_N >= capacity, -1).view(blocks, K, size).transpose(1, 2)
    slots_bsK = torch.empty_like(slots_bsK).scatter_(1, order_bsK, slots_bsK)
    return slots_bsK.reshape(T, K), wanted.view(blocks, num_experts).clamp(max=capacity)


def _queue(key_N: Tensor, queues: int) -> tuple[Tensor, Tensor]:
    """Place of each in the queue `key_N` names, first come first served; length of each queue. int64."""
    sorted_N, origin_N = key_N.sort(stable=True)
    # Not bincount, which asks the device for the largest value.
    wanted = key_N.new_zeros(queues).scatter_add_(0, sorted_N, torch.ones_like(sorted_N))
    start = wanted.cumsum(0).sub_(wanted)
    place_N = torch.arange(key_N.numel(), device=key_N.device) - start[sorted_N]
    return torch.empty_like(key_N).scatter_(0, origin_N, place_N), wanted
