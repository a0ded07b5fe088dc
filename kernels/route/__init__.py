"""Which experts a token takes, and which slot it gets there (METHODS R1-R3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, implementation
from . import naive, vectorised
from .naive import Score, scores

__all__ = ["Score", "assign", "choose", "scores", "select"]


def choose(
    logits_TE: Tensor,
    k: int,
    score: Score = "softmax",
    groups: int = 1,
    top_groups: int = 1,
    bias_E: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Scores [T, E] of a gate's logits, and the experts that `select` makes of scores plus bias; int64 [T, k].

    Differentiable in the logits, through the scores. `logits_TE` is fp32 or wider; the bias steers selection only.
    """
    if implementation(backend, logits_TE.device) == "triton":
        from . import kernel

        return kernel.choose(logits_TE, bias_E, k, score, groups, top_groups)
    scores_TE = scores(logits_TE, score)
    steered_TE = scores_TE.detach()
    if bias_E is not None:
        steered_TE = steered_TE + bias_E.to(scores_TE.dtype)
    return scores_TE, select(steered_TE, k, groups, top_groups, backend)


@torch.no_grad()
def select(scores_TE: Tensor, k: int, groups: int = 1, top_groups: int = 1, backend: Backend = "auto") -> Tensor:
    """The k experts of highest score per token, best first, ties to the lower index: int64 [T, k].

    With `groups` > 1 a token chooses among the `top_groups` groups whose two best scores sum highest.
    """
    found = implementation(backend, scores_TE.device)
    if found == "triton":
        from . import kernel

        return kernel.choose_fwd(scores_TE, None, k, "given", groups, top_groups)[1]
    return (naive if found == "reference" else vectorised).select(scores_TE, k, groups, top_groups)


@torch.no_grad()
def assign(
    experts_TK: Tensor,
    priority_T: Tensor | None,
    num_experts: int,
    blocks: int = 1,
    capacity: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Slots int64 [T, K] (-1: dropped) and slots taken int64 [blocks, E]; see `naive.assign`.

    Without a capacity nobody waits: the order inside a queue carries no meaning, back ends may differ in it, and
    `priority_T` is not needed.
    """
    found = implementation(backend, experts_TK.device)
    if found == "torch" and capacity is None:
        return vectorised.assign_all(experts_TK, num_experts, blocks)
    if priority_T is None and (capacity is not None or found == "reference"):
        priority_T = torch.zeros(experts_TK.size(0), dtype=torch.int32, device=experts_TK.device)
    if found == "triton":
        from . import kernel

        return kernel.assign(experts_TK, priority_T, num_experts, blocks, capacity)
    assert priority_T is not None
    if found == "torch" and capacity is not None:
        return vectorised.assign(experts_TK, priority_T, num_experts, blocks, capacity)
    return naive.assign(experts_TK, priority_T, num_experts, blocks, capacity)
