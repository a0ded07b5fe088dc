"""How ranks are laid out, and what they keep for backward. Torch-free, so that planners read it without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

AXES = ("pipeline", "data", "shard", "tensor")
"""What the world is the product of, the outermost first. Experts lie over the ranks of one pipeline stage."""

CHUNKED = ("interleaved", "dualpipev")
"""Schedules that give every rank several chunks of the model."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """World size = `pipeline` x `data` x `shard` x `tensor`; `expert` divides the ranks of a stage (folding).

    Attention and dense layers see a stage as data x shard x tensor ranks, experts see the same ranks as copies of
    `expert` consecutive ones that together hold all experts.
    """

    pipeline: int = 1
    """Groups of ranks that the layers are cut over, one after the other."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "dualpipev"] = "1f1b"
    """Order of the forwards and backwards of a step's micro-batches (`train.accumulate`) in a pipeline."""
    chunks: int | Literal["auto"] = "auto"
    """Stages on each rank of a pipeline; `auto` is 2 for interleaved and dualpipev, else 1."""
    cut: tuple[int, ...] = ()
    """Layers of each stage, in the model's order; empty cuts so that stages have about as many parameters."""
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
        self._check_chunks()
        if min(self.cut, default=1) < 1:
            raise ValueError(f"cut: {list(self.cut)} has a stage without layers; give every stage 1 or more")
        if self.data != "auto" and self.stage() % self.expert:
            fix = math.gcd(self.stage(), self.expert)
            raise ValueError(
                f"expert: {self.expert} does not divide the {self.stage()} ranks of a stage (data {self.data} x shard "
                f"{self.shard} x tensor {self.tensor}); use {fix}"
            )

        block = self.shard * self.tensor
        if self.shard > 1 and max(block, self.expert) % min(block, self.expert):
            raise ValueError(
                f"expert: of {self.expert} and the {block} ranks of one copy (shard {self.shard} x tensor "
                f"{self.tensor}) neither divides the other; use {math.gcd(block, self.expert)}"
            )

    def _check_chunks(self) -> None:
        if self.chunks == "auto":
            return
        if self.schedule == "dualpipev" and self.chunks != 2:
            raise ValueError(f"chunks: {self.chunks} does not go with schedule: dualpipev, which has 2; use 2 or auto")
        if self.schedule == "interleaved" and self.chunks < 2:
            raise ValueError(f"chunks: {self.chunks} leaves nothing to interleave; use 2 or more, or schedule: 1f1b")
        if self.schedule not in CHUNKED and self.chunks != 1:
            raise ValueError(
                f"chunks: {self.chunks} does not go with schedule: {self.schedule}, which has 1; use 1, or schedule: "
                "interleaved"
            )

    @property
    def expert_shard(self) -> int:
        """Ranks that share the storage of the same experts: the copies of the experts that one dense copy spans."""
        return max(1, self.shard * self.tensor // self.expert) if self.shard > 1 else 1

    @property
    def num_chunks(self) -> int:
        """Stages on each rank."""
        if self.pipeline == 1:
            return 1
        return (2 if self.schedule in CHUNKED else 1) if self.chunks == "auto" else self.chunks

    @property
    def num_stages(self) -> int:
        """Parts that the layers are cut into."""
        return self.pipeline * self.num_chunks

    def runs(self, micro_batches: int) -> bool:
        """Whether the schedule has an order for so many micro-batches; torch and Lynx agree on it."""
        if self.pipeline == 1 or self.schedule == "gpipe":
            return True
        if self.schedule == "interleaved":
            return micro_batches % self.pipeline == 0
        if self.schedule == "zb-h1":
            # torch goes in rounds of equally many, about `pipeline` each.
            return micro_batches % max(1, micro_batches // self.pipeline) == 0
        return micro_batches >= self.num_stages

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


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """What backward computes again instead of keeping it (docs/parallelism.md): less memory, more time, same bits."""

    mode: Literal["none", "selective", "full", "lynx"] = "none"
    """Nothing; what experts and dense feed-forward layers compute inside; whole blocks, of which only inputs stay; what
    a plan says (docs/lynx.md)."""
    budget: int | Literal["auto"] = "auto"
    """Bytes of a rank that weights, gradients, optimizer state and activations may take together, for `lynx`; `auto` is
    nine tenths of a GPU's memory, or a rank's part of the machine's."""
    solver: Literal["heu-mix", "heu", "greedy", "opt"] = "heu-mix"
    """Of the plan (docs/lynx.md)."""
    measure_steps: int = 3
    """Steps that are run and measured before each plan, with everything computed again on demand."""
    drift: float = 0.25
    """Part of the choices of experts that may have moved to other experts before it is planned anew."""

    def __post_init__(self) -> None:
        if self.budget != "auto" and self.budget < 1:
            raise ValueError(f"budget: {self.budget} holds nothing; use a size such as 4GiB, or auto")
        if self.measure_steps < 1:
            raise ValueError(f"measure_steps: {self.measure_steps} measures nothing; use 1 or more")
        if not 0 < self.drift <= 1:
            raise ValueError(f"drift: {self.drift} is no part of all choices; use more than 0 and at most 1")


KEEP_ALL = RecomputeConfig()
