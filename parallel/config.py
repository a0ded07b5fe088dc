"""How ranks are laid out. Torch-free, so that planners read it without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """World size = `data` x `expert`. Every rank holds its own tokens and all dense weights."""

    data: int | Literal["auto"] = "auto"
    """Copies of every expert; `auto` takes the ranks that `expert` leaves over."""
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
        if self.expert < 1:
            raise ValueError(f"expert: {self.expert} is not a number of ranks; use 1 or more")
        if self.piece_bytes != "auto" and self.piece_bytes < 0:
            raise ValueError(f"piece_bytes: {self.piece_bytes} is negative; use 0 (never cut), a size, or auto")
        if self.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes: {self.bucket_bytes} holds nothing; use a size such as 25MiB")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds: {self.timeout_seconds} is not a duration; use for example 600")

    def world(self, ranks: int | None = None) -> int:
        """World size this layout asks for; `data: auto` takes what `ranks` allows (default: one copy)."""
        if self.data == "auto":
            return self.expert if ranks is None else ranks
        return self.data * self.expert
