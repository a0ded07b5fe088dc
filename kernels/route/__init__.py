"""Which experts a token takes, and which slot it gets there (METHODS R1-R3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, is_reference
from . import naive, vectorised

__all__ = ["assign", "select"]


@torch.no_grad()
def select(scores_TE: Tensor, k: int, groups: int = 1, top_groups: int = 1, backend: Backend = "auto") -> Tensor:
    """The k experts of highest score per token, best first, ties to the lower index: int64 [T, k].

    With `groups` > 1 a token chooses among the `top_groups` groups whose two best scores sum highest.
    """
    chosen = naive if is_reference(backend) else vectorised
    return chosen.select(scores_TE, k, groups, top_groups)


@torch.no_grad()
def assign(
    experts_TK: Tensor,
    priority_T: Tensor,
    num_experts: int,
    blocks: int = 1,
    capacity: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Slots int64 [T, K] (-1: dropped) and slots taken int64 [blocks, E]; see `naive.assign`.

    Without a capacity the order inside a queue carries no meaning and back ends may differ in it.
    """
    chosen = naive if is_reference(backend) else vectorised
    return chosen.assign(experts_TK, priority_T, num_experts, blocks, capacity)
