"""Reference of expert selection and slot assignment (METHODS R1-R3), written to be read."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]


def scores(logits_TE: Tensor, score: Score) -> Tensor:
    """What experts are chosen by, [T, E] with gradient."""
    return logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()


def select(scores_TE: Tensor, k: int, groups: int = 1, top_groups: int = 1) -> Tensor:
    """The k experts of highest score per token, best first, ties to the lower index.

    With `groups` > 1 only the `top_groups` groups whose two best scores sum highest are eligible.
    Returns int64 [T, k].
    """
    T, E = scores_TE.shape
    if groups > 1:
        grouped = scores_TE.view(T, groups, E // groups)
        best_two = grouped.sort(dim=-1, descending=True, stable=True).values[..., :2].sum(-1)
        kept = best_two.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
        eligible = torch.zeros(T, groups, dtype=torch.bool, device=scores_TE.device).scatter_(1, kept, True)
        scores_TE = grouped.masked_fill(~eligible.unsqueeze(-1), -torch.inf).view(T, E)
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def assign(
    experts_TK: Tensor, priority_T: Tensor, num_experts: int, blocks: int, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """The slot each choice takes in its expert's queue, block by block (METHODS R2, R3).

    Tokens are cut into `blocks` equal consecutive blocks. In a block all first choices queue before any second
    choice, and so on; within one rank of choice by descending `priority_T`, ties by token index. A choice that
    finds `capacity` slots taken gets slot -1: dropped. Returns slots int64 [T, K] and counts int64
    [blocks, E] of the slots taken.
    """
    T, K = experts_TK.shape
    slots_TK = torch.empty_like(experts_TK)
    counts_BE = torch.zeros(blocks, num_experts, dtype=torch.int64, device=experts_TK.device)
    size = T // blocks
    for block in range(blocks):
        token = slice(block * size, (block + 1) * size)
        order = priority_T[token].sort(descending=True, stable=True).indices
        queue = experts_TK[token][order].t().reshape(-1)  # [K * size]: first choices of all, then second ...
        taken = torch.nn.functional.one_hot(queue, num_experts)
        slot = ((taken.cumsum(0) - taken) * taken).sum(-1)
        if capacity is not None:
            slot = torch.where(slot < capacity, slot, -1)
        unsorted = torch.empty(K, size, dtype=torch.int64, device=queue.device)
        unsorted[:, order] = slot.view(K, size)
        slots_TK[token] = unsorted.t()
        counts_BE[block] = taken[slot >= 0].sum(0)
    return slots_TK, counts_BE
