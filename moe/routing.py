"""The routing decision as one value: made by the router, read by every later stage, recomputed by none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What became of every choice of the T tokens of this rank. Legend of suffixes: DESIGN, `moe/__init__.py`."""

    experts_TK: Tensor
    """int64: chosen experts, best first."""
    weights_TK: Tensor
    """fp32 (or wider): combine weight of each choice, 0 where dropped; carries the router's gradient."""
    slots_TK: Tensor
    """int64: place in the queue of (block, expert); -1: dropped."""
    counts_BE: Tensor
    """int64: slots taken per block and expert; what dispatch sends."""
    capacity: int | None
    """Slots per (block, expert); None: dropless."""
    logits_TE: Tensor
    """fp32 (or wider) router logits, with gradient: z-loss reads them."""
    probs_TE: Tensor
    """fp32 (or wider) scores that sum to one over the experts, with gradient: the balance loss reads them."""

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
    def load_E(self) -> Tensor:
        """int64: choices per expert before any was dropped."""
        return self.experts_TK.reshape(-1).bincount(minlength=self.num_experts)

    @property
    def num_kept(self) -> Tensor:
        """int64 scalar: choices that got a slot."""
        return self.counts_BE.sum()
