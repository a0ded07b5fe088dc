"""Routing in Triton: scores, selection and slots. No host synchronisation; ties go to the lower index.

select_fwd   one program a token: softmax or sigmoid, selection bias, group limit, top-k
count_fwd    how often each expert occurs in each piece of the queues
place_fwd    slot of each choice: those before its piece, and those before it within
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from ..operator import operator
from ..tiles import accumulator, dense_rows, pieces, power_of_two

PIECE = 64
"""Choices that a program of `count_fwd` and `place_fwd` takes: a square of them is compared at once."""


@triton.jit
def _pick(scores, index, SIZE: tl.constexpr):
    """Index of the largest of `scores`, the lowest among equals; `index` counts 0 .. SIZE - 1."""
    best = tl.max(scores, 0)
    # Of scores that are not numbers none equals the largest: any index within will do.
    return tl.minimum(tl.min(tl.where(scores == best, index, SIZE), 0), SIZE - 1)


@triton.jit
def select_fwd(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E], or anything where not BIASED
    scores_ptr,  # [T, E], or anything where SCORE is "given"
    chosen_ptr,  # int64 [T, K]
    E,
    per_group,
    logits_stride,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCORE: tl.constexpr,
    BIASED: tl.constexpr,
    ACC: tl.constexpr,
    PAD_GROUPS: tl.constexpr,
    PAD_EACH: tl.constexpr,
):
    """Scores of all experts, and the K best of them: experts lie as [PAD_GROUPS, PAD_EACH], in order."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PAD_GROUPS * PAD_EACH)
    group, within = index // PAD_EACH, index % PAD_EACH
    expert = group * per_group + within
    there = (group < GROUPS) & (within < per_group)
    nothing = float("-inf")
    logits = tl.load(logits_ptr + token * logits_stride + expert, mask=there, other=nothing).to(ACC)
    scores = logits
    if SCORE == "softmax":
        powers = tl.exp(logits - tl.max(logits, 0))
        scores = powers / tl.sum(powers, 0)
    if SCORE == "sigmoid":
        scores = 1 / (1 + tl.exp(-logits))
    if SCORE != "given":
        tl.store(scores_ptr + token * E + expert, scores, mask=there)
    if BIASED:
        scores += tl.load(bias_ptr + expert, mask=there, other=0.0).to(ACC)
    # What is not a number is chosen last, never outside the experts.
    scores = tl.where(there & (scores == scores), scores, nothing)
    if GROUPS > 1:
        square = tl.reshape(scores, (PAD_GROUPS, PAD_EACH))
        best = tl.max(square, 1)
        column = tl.arange(0, PAD_EACH)[None, :]
        first = tl.min(tl.where(square == best[:, None], column, PAD_EACH), 1)
        second = tl.max(tl.where(column == first[:, None], nothing, square), 1)
        number = tl.arange(0, PAD_GROUPS)
        worth = tl.where(number < GROUPS, best + tl.where(per_group > 1, second, 0.0), nothing)
        taken = number < 0
        for _ in tl.static_range(TOP_GROUPS):  # pyright: ignore[reportGeneralTypeIssues]
            pick = _pick(worth, number, GROUPS)
            taken = taken | (number == pick)
            worth = tl.where(number == pick, nothing, worth)
        square = tl.where(taken[:, None], square, nothing)
        scores = tl.reshape(square, (PAD_GROUPS * PAD_EACH,))
    for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        pick = _pick(scores, index, PAD_GROUPS * PAD_EACH)
        tl.store(chosen_ptr + token * K + k, ((pick // PAD_EACH) * per_group + pick % PAD_EACH).to(tl.int64))
        scores = tl.where(index == pick, nothing, scores)


@triton.jit
def _queue(experts_ptr, order_ptr, block, piece, size, K, ORDERED: tl.constexpr, PIECE: tl.constexpr):
    """A piece of a block's queue: whether each place is taken, the choice's offset, and its expert.

    ORDERED: all first choices come before all second ones, and within one rank of choice tokens stand in `order`; else
    choices stand as they lie in memory.
    """
    # In 32 bits, which divide faster; a queue is shorter than 2^31.
    place = piece * PIECE + tl.arange(0, PIECE)
    taken = place < size * K
    choice = block * size * K + place
    if ORDERED:
        token = tl.load(order_ptr + block * size + place % size, mask=taken, other=0)
        choice = (block * size + token) * K + place // size
    return taken, choice, tl.load(experts_ptr + choice, mask=taken, other=-1)


@triton.jit
def count_fwd(
    experts_ptr,  # int64 [T, K]
    order_ptr,  # int64 [blocks, size], or anything where not ORDERED
    counts_ptr,  # int32 [blocks, E, pieces]
    size,
    K,
    E,
    ORDERED: tl.constexpr,
    PIECE: tl.constexpr,
    PAD_E: tl.constexpr,
):
    """counts[b, e, p] = how often expert e occurs in piece p of the queue of block b."""
    piece, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    taken, _, expert = _queue(experts_ptr, order_ptr, block, piece, size, K, ORDERED, PIECE)  # pyright: ignore[reportGeneralTypeIssues]
    number = tl.histogram(expert.to(tl.int32), PAD_E, mask=taken)
    e = tl.arange(0, PAD_E)
    tl.store(counts_ptr + (block * E + e) * tl.num_programs(0) + piece, number, mask=e < E)


@triton.jit
def place_fwd(
    experts_ptr,  # int64 [T, K]
    order_ptr,  # int64 [blocks, size], or anything where not ORDERED
    until_ptr,  # int32 [blocks, E, pieces]: the counts of all pieces up to and with p
    slots_ptr,  # int64 [T, K]
    taken_ptr,  # int64 [blocks, E]
    size,
    K,
    E,
    capacity,
    LIMITED: tl.constexpr,
    ORDERED: tl.constexpr,
    PIECE: tl.constexpr,
    PAD_E: tl.constexpr,
):
    """slots[choice] = choices of the same expert before it in the queue; -1 from `capacity` on, where LIMITED.

    The last piece also says how many slots are taken.
    """
    piece, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pieces = tl.num_programs(0)
    taken, choice, expert = _queue(experts_ptr, order_ptr, block, piece, size, K, ORDERED, PIECE)  # pyright: ignore[reportGeneralTypeIssues]
    index = tl.arange(0, PIECE)
    same = (expert[:, None] == expert[None, :]) & (index[None, :] < index[:, None])
    before = tl.load(until_ptr + (block * E + expert) * pieces + piece - 1, mask=taken & (piece > 0), other=0)
    slot = (before + tl.sum(same.to(tl.int32), 1)).to(tl.int64)
    if LIMITED:
        slot = tl.where(slot < capacity, slot, -1)
    tl.store(slots_ptr + choice, slot, mask=taken)
    if piece == pieces - 1:
        e = tl.arange(0, PAD_E)
        total = tl.load(until_ptr + (block * E + e) * pieces + piece, mask=e < E, other=0).to(tl.int64)
        if LIMITED:
            total = tl.minimum(total, capacity)
        tl.store(taken_ptr + block * E + e, total, mask=e < E)


def choose_fwd(
    logits_TE: Tensor, bias_E: Tensor | None, k: int, score: str, groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    """Scores [T, E] of fp32 or wider, and int64 [T, k] experts by score plus bias; `given`: logits are scores."""
    T, E = logits_TE.shape
    acc = accumulator(logits_TE)
    scores_TE = logits_TE
    if score != "given":
        scores_TE = logits_TE.new_empty(T, E, dtype=torch.float64 if acc == tl.float64 else torch.float32)
    chosen_TK = torch.empty(T, k, dtype=torch.int64, device=logits_TE.device)
    if T:
        logits_TE = dense_rows(logits_TE)
        each = power_of_two(E // groups)
        padded = each * power_of_two(groups)
        launch(select_fwd, (T,),
            logits_TE, logits_TE if bias_E is None else bias_E.contiguous(), scores_TE, chosen_TK,
            E, E // groups, logits_TE.stride(0),
            K=k, GROUPS=groups, TOP_GROUPS=top_groups, SCORE=score, BIASED=bias_E is not None, ACC=acc,
            PAD_GROUPS=padded // each, PAD_EACH=each, num_warps=1 if padded <= 256 else 4,
        )  # fmt: skip
    return scores_TE, chosen_TK


def _choose_fake(logits_TE, bias_E, k, score, groups, top_groups):
    scores_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    return scores_TE, logits_TE.new_empty(logits_TE.size(0), k, dtype=torch.int64)


def _save(ctx, inputs, output) -> None:
    scores_TE, chosen_TK = output
    ctx.save_for_backward(scores_TE)
    ctx.score = inputs[3]
    ctx.mark_non_differentiable(chosen_TK)


def _backward(ctx, grad_TE: Tensor, _):
    (scores_TE,) = ctx.saved_tensors
    if ctx.score == "sigmoid":
        grad = grad_TE * scores_TE * (1 - scores_TE)
    else:
        grad = (grad_TE - (grad_TE * scores_TE).sum(-1, keepdim=True)) * scores_TE
    return grad, None, None, None, None, None


_choose = operator("choose", choose_fwd, _choose_fake, _save, _backward)


def choose(
    logits_TE: Tensor, bias_E: Tensor | None, k: int, score: str, groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    """Scores of a gate's fp32 or fp64 logits, with gradient, and the k experts by score plus bias."""
    return _choose(logits_TE, bias_E, k, score, groups, top_groups)


def assign_fwd(
    experts_TK: Tensor, priority_T: Tensor | None, num_experts: int, blocks: int, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """Slots and counts of `naive.assign`; a priority only where there is a capacity."""
    (T, K), E, device = experts_TK.shape, num_experts, experts_TK.device
    size = T // blocks
    experts_TK = experts_TK.contiguous()
    slots_TK = torch.empty(T, K, dtype=torch.int64, device=device)
    if slots_TK.numel() == 0:
        return slots_TK, torch.zeros(blocks, E, dtype=torch.int64, device=device)
    counts_BE = torch.empty(blocks, E, dtype=torch.int64, device=device)
    order, limit = experts_TK, 0
    if capacity is not None:
        assert priority_T is not None
        order, limit = priority_T.view(blocks, size).sort(dim=-1, descending=True, stable=True).indices, capacity
    num_pieces = pieces(size * K, PIECE)
    options = {"ORDERED": capacity is not None, "PIECE": PIECE, "PAD_E": power_of_two(E), "num_warps": 4}
    counts_BEP = torch.empty(blocks, E, num_pieces, dtype=torch.int32, device=device)
    launch(count_fwd, (num_pieces, blocks), experts_TK, order, counts_BEP, size, K, E, **options)
    until_BEP = counts_BEP.cumsum(-1, dtype=torch.int32)
    launch(place_fwd, (num_pieces, blocks),
        experts_TK, order, until_BEP, slots_TK, counts_BE, size, K, E, limit,
        LIMITED=capacity is not None, **options,
    )  # fmt: skip
    return slots_TK, counts_BE


def _assign_fake(experts_TK, priority_T, num_experts, blocks, capacity):
    return torch.empty_like(experts_TK), experts_TK.new_empty(blocks, num_experts)


_assign = operator("assign", assign_fwd, _assign_fake)


def assign(
    experts_TK: Tensor, priority_T: Tensor | None, num_experts: int, blocks: int, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """As `naive.assign`."""
    return _assign(experts_TK, priority_T, num_experts, blocks, capacity)
