"""TrainConfig: everything one YAML file can say. Loading and checking stand in `settings.py`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..moe.config import ModelConfig, RouterConfig, nearest_divisor
from ..parallel.config import ParallelConfig, RecomputeConfig
from .engine_config import DeepSpeedConfig, EngineName, MegatronConfig
from .optimizer_config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """Cosine decay, warm-up-stable-decay (linear tail), or constant after the warm-up."""
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, as a part of the peak."""
    decay_ratio: float = 0.2
    """Part of all steps that `wsd` decays over."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: {self.warmup_steps} is negative; use 0 or more")
        for name in ("min_lr_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is outside [0, 1]; use for example 0.1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    corpus: str = "shakespeare"
    """`shakespeare`, `sotu`, a text or JSONL file, the PREFIX of Megatron's PREFIX.bin and PREFIX.idx (or of a pair
    PREFIX-train, PREFIX-val), or a folder that `wastenot data prepare` wrote (which brings its own tokenizer and
    split)."""
    tokenizer: str = "bpe:2048"
    """`bytes`, `bpe:N` (trained on the training split), or a Hugging Face tokenizer.json; the latter for tokens of
    Megatron's, which must be its own."""
    dir: str = "data"
    """Where fetched and prepared corpora are kept."""
    seq_len: int = 256
    val_fraction: float = 0.05
    """The last part of every document is held out for evaluation."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"seq_len: {self.seq_len} holds no prediction; use 2 or more")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction: {self.val_fraction} is outside (0, 1); use for example 0.05")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from another model beside the text (arXiv 1503.02531): the loss is
    (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || model), both per token."""

    teacher: str
    """A run of the same tokenizer, whose newest checkpoint is read. Whatever its capacity, it drops no token."""
    weight: float = 0.5
    temperature: float = 1.0
    """Above 1 the teacher's less likely tokens count for more."""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("teacher: the name is empty; give the log.dir of a training run")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight: {self.weight} is outside [0, 1]; use {1.0 if self.weight > 1 else 0.0}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} is not positive; use for example 1.0")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    steps: int = 1000
    batch: int = 16
    """Sequences per optimizer step over all ranks: the same data whatever the world size."""
    accumulate: int = 1
    """Micro-batches that one step's batch is cut into."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16 computes matrix products in bfloat16 over fp32 weights; router, norms and loss stay fp32."""
    seed: int = 0
    nproc: int = 0
    """Local ranks to start where no launcher did; 0 means data x expert."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_batch: int = 32
    """Sequences per evaluation batch over all ranks."""
    sample_tokens: int = 120
    """Length of the text sampled at the end; 0 samples none."""
    nonfinite_limit: int = 10
    """Steps with a non-finite loss or gradient are skipped; after this many in a row the run stops."""
    deterministic: bool = True
    """Use deterministic kernels where torch has them."""
    start: str | None = None
    """A run whose weights, of its newest checkpoint, a new run begins with; its optimizer's state stays behind. Layers
    that only attend there and are dense here begin as stubs, which change nothing until they have learned."""
    only: Literal["all", "router", "norms", "stub"] = "all"
    """What learns: everything, routers, norms, or the dense feed-forward networks. The rest stays bit for bit."""
    keep_zeros: bool = False
    """Weights of experts that are zero where the run begins stay zero: what slimming and skipped experts left."""
    distill: DistillConfig | None = None
    """Learn from another run as well."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "eval_batch", "nonfinite_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; use 1 or more")
        for name in ("nproc", "eval_every", "sample_tokens", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; use 0 or more")
        if self.batch % self.accumulate:
            nearest = nearest_divisor(self.batch, self.accumulate)
            raise ValueError(f"accumulate: {self.accumulate} does not divide batch: {self.batch}; use {nearest}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 500
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Newest complete checkpoints that stay."""
    asynchronous: bool = True
    """Write while training goes on, a copy taken before the next step (native and megatron engines)."""
    resume: str = "auto"
    """`auto` continues from the newest complete checkpoint in log.dir, `never` refuses a used log.dir, or a path."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every: {self.every} is negative; use 0 (only at the end) or more")
        if self.keep < 1:
            raise ValueError(f"keep: {self.keep} would leave no checkpoint; use 1 or more")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    dir: str = "runs/default"
    every: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Also write TensorBoard events (extra `viz`; without it a note says so and the run goes on)."""
    profile: tuple[int, ...] = ()
    """[first, last] steps to trace with torch.profiler into log.dir/profile; empty traces none."""
    debug: bool = False
    """Check internal identities at every step, and that what `recompute.mode: lynx` computes again is what was."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: {self.every} is too small; use 1 or more")
        if self.profile and (len(self.profile) != 2 or not 0 <= self.profile[0] <= self.profile[1]):
            raise ValueError(f"profile: {list(self.profile)} is not [first, last]; use for example [10, 12]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Keys of the YAML file are these fields."""

    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    kernels: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Which implementation of route, dispatch, combine and grouped experts runs."""
    engine: EngineName = "native"
    """What trains: wastenot's own runtime, or DeepSpeed or Megatron-Core (extras of those names)."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
