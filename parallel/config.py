"""How ranks are laid out. Torch-free, so that planners read it without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

AXES = ("pipeline", "data", "shard", "tensor")
"""What the world is the product of, the outermost first. Experts lie over the ranks of one pipeline stage."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """World size = `pipeline` x `data` x `shard` x `tensor`; `expert` divides the ranks of a stage (folding).

    Attention and dense layers see a stage as data x shard x tensor ranks, experts see the same ranks as copies of
    `expert` consecutive ones that together hold all experts.
    """

    pipeline: int = 1
    """Stages that the layers are cut into, one after the other."""
    data: int | Literal["auto"] = "auto"
    """Copies of the dense weights; `auto` takes the ranks that the others leave over."""
    shard: int = 1
    """Ranks that share the storage of one copy (FSDP2): weights are gathered for use, layer by layer."""
    tensor: int = 1
    """Ranks that compute every dense layer together, each on its heads and its part of the sequence."""
    expert: int = 1
    """Ranks that share one copy of the experts; each holds experts/expert of them."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """`auto` is nccl on GPUs and gloo on CPUs."""
    piece_bytes: int | Literal["auto"] = "auto"
    """Largest message of an expert all-to-all; larger ones are cut. 0 never cuts, `auto` measures the link."""
    bucket_bytes: int = 25 * 2**20
    """Gradients are reduced in flat buffers of about this size while backward still runs."""
    timeout_seconds: float = 600.0
    """A collective that takes longer is a hang: the watchdog names its rank and its place."""

    def __post_init__(self) -> None:
        if self.data != "auto" and self.data < 1:
            raise ValueError(f"data: {self.data} is not a number of copies; use 1 or more, or auto")
        for name in ("pipeline", "shard", "tensor", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a number of ranks; use 1 or more")
        if self.piece_bytes != "auto" and self.piece_bytes < 0:
            raise ValueError(f"piece_bytes: {self.piece_bytes} is negative; use 0 (never cut), a size, or auto")
        if self.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes: {self.bucket_bytes} holds nothing; use a size such as 25MiB")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds: {self.timeout_seconds} is not a duration; use for example 600")
        if self.data != "auto" and self.stage() % self.expert:
            fix = math.gcd(self.stage(), self.expert)
            raise ValueError(
                f"expert: {self.expert} does not divide the {self.stage()} ranks of a stage (data {self.data} x shard "
                f"{self.shard} x tensor {self.tensor}); use {fix}"
            )

    def copies(self, ranks: int | None = None) -> int:
        """`data`, or what it comes to with `ranks`; without those, the fewest that `expert` divides."""
        if self.data != "auto":
            return self.data
        one = self.shard * self.tensor
        return self.expert // math.gcd(self.expert, one) if ranks is None else ranks // (self.pipeline * one)

    def stage(self, ranks: int | None = None) -> int:
        """Ranks that hold the same layers."""
        return self.copies(ranks) * self.shard * self.tensor

    def world(self, ranks: int | None = None) -> int:
        """World size this layout asks for; `data: auto` takes what `ranks` allows (default: the fewest)."""
        return self.pipeline * self.stage(ranks)
