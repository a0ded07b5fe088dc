"""How a model is laid out over devices, and in what portions it is fed.

Ranks are numbered as Megatron's are: tensor parallelism innermost, then data, pipeline outermost. Attention and dense
layers are shared by `tensor` ranks and repeated on `data`. Experts are cut over `expert` neighbouring ranks of one
pipeline stage and repeated on the `tensor * data / expert` groups of them (Megatron's expert data parallelism; its
expert tensor parallelism is 1 here): `expert` must divide `tensor * data`, and the number of experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .nearest import nearest_divisor, nearest_multiple, refuse_other_than
from .shape import ModelShape

Dtype = Literal["fp32", "bf16", "fp16", "fp8"]
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Of an activation. With fp8 only the peak of matrix products differs: activations are kept in 16 bits."""


@dataclass(frozen=True)
class Group:
    """Ranks first, first + stride, ... that communicate with one another."""

    size: int
    stride: int = 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism, micro-batches, and what of an implementation changes bytes."""

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    data: int = 1
    chunks: int = 1
    """Virtual pipeline stages per rank (interleaved schedules)."""
    sequence_parallel: bool = False
    """Norms, dropouts and the residual stream are cut along the sequence between tensor-parallel ranks."""
    seq_len: int = 4096
    micro_batch: int = 1
    """Sequences of one micro-batch."""
    micro_batches: int = 1
    """Per step and data-parallel rank."""
    compute: Dtype = "bf16"
    """Of matrix products and of the activations around them."""
    residual: Literal["compute", "fp32"] = "compute"
    """Of the residual stream; wastenot keeps it in fp32."""
    weights: Literal["compute", "fp32"] = "compute"
    """What the weights are kept in; wastenot keeps fp32 and casts."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in."""
    zero: Literal[0, 1, 3] = 0
    """What data parallelism cuts: nothing, the optimizer's state (ZeRO-1), or weights and gradients too (FSDP)."""
    shard: int = 0
    """Of `data`, the neighbouring ranks that ZeRO-3 cuts over, repeated on the others (HSDP); 0: all of them."""
    flash: bool = True
    """Attention that keeps its output and log-sum-exp; otherwise softmax and what dropout makes of it are kept."""
    capacity_factor: float | None = None
    """Slots per (source rank, expert) are ceil(top_k * factor * T / E) (METHODS R2); None drops nothing."""
    padded: bool = False
    """Empty slots travel and are computed too."""
    merged_dispatch: bool = False
    """A token goes to another node once, however many of its experts are there, and is copied there (DeepEP); its
    outputs come back likewise. Otherwise every route is a row of its own, as with plain all-to-alls."""
    loss_chunk: int = 0
    """Tokens whose logits exist at a time, with gradients formed beside them; 0: all are kept for the backward."""
    eager: bool = False
    """Plain autograd, as wastenot trains: dense SwiGLU keeps what SiLU gave and MoE what experts gave, gradients of
    weights are formed before they are added, weights that are cast stay so until the backward, and with ZeRO-3
    gradients are whole while micro-batches accumulate. Otherwise kernels are fused, as Megatron-Core's are."""

    def __post_init__(self) -> None:
        for name in ("tensor", "expert", "pipeline", "data", "chunks", "seq_len", "micro_batch", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"layout.{name}: {getattr(self, name)} is too small; use 1 or more")
        refuse_other_than(self.compute, _BYTES, "layout.compute")
        refuse_other_than(self.residual, ("compute", "fp32"), "layout.residual")
        refuse_other_than(self.weights, ("compute", "fp32"), "layout.weights")
        refuse_other_than(self.gradients, ("fp32", "bf16"), "layout.gradients")
        if self.zero not in (0, 1, 3):
            nearest = 1 if self.zero == 2 else 3 if self.zero > 3 else 0
            raise ValueError(f"layout.zero: {self.zero} is not one of 0, 1, 3; use {nearest}")
        ranks = self.tensor * self.data
        if ranks % self.expert:
            raise ValueError(
                f"layout.expert: {self.expert} does not divide the {ranks} ranks of a stage (tensor {self.tensor} x "
                f"data {self.data}); use {nearest_divisor(ranks, self.expert)}"
            )
        if self.shard and (self.zero != 3 or self.shard < 0 or self.data % self.shard):
            fix = nearest_divisor(self.data, max(1, self.shard)) if self.zero == 3 else 0
            raise ValueError(
                f"layout.shard: {self.shard} does not divide data: {self.data} with zero: {self.zero}; use {fix}"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("layout.sequence_parallel: true has no effect with tensor: 1; use false, or tensor: 2")
        if self.seq_len % self.tensor and self.sequence_parallel:
            raise ValueError(
                f"layout.tensor: {self.tensor} does not divide seq_len: {self.seq_len}, which sequence_parallel cuts; "
                f"use {nearest_divisor(self.seq_len, self.tensor)}"
            )
        if self.chunks > 1 and self.pipeline == 1:
            raise ValueError(f"layout.chunks: {self.chunks} has no effect with pipeline: 1; use 1")
        if self.chunks > 1 and self.micro_batches % self.pipeline:
            raise ValueError(
                f"layout.micro_batches: {self.micro_batches} is no multiple of pipeline: {self.pipeline}, as chunks "
                f"need it; use {nearest_multiple(self.micro_batches, self.pipeline)}"
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"layout.capacity_factor: {self.capacity_factor} leaves no slot; use for example 1.0")
        if self.padded and self.capacity_factor is None:
            raise ValueError("layout.padded: true needs a capacity_factor; set one, for example 1.0, or padded: false")
        if self.loss_chunk < 0:
            raise ValueError(f"layout.loss_chunk: {self.loss_chunk} is negative; use 0 for the whole micro-batch")

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def expert_data(self) -> int:
        """Copies of every expert."""
        return self.tensor * self.data // self.expert

    @property
    def dense_cut(self) -> int:
        """Ranks that share the storage of dense weights with ZeRO-3."""
        return self.shard or self.data

    @property
    def expert_cut(self) -> int:
        """Ranks that share the storage of the same experts with ZeRO-3: those within one copy of the dense weights."""
        return max(1, self.dense_cut * self.tensor // self.expert)

    @property
    def global_batch(self) -> int:
        """Sequences per step over all ranks."""
        return self.data * self.micro_batches * self.micro_batch

    @property
    def tokens(self) -> int:
        """Of a micro-batch, over all tensor-parallel ranks."""
        return self.micro_batch * self.seq_len

    @property
    def local_tokens(self) -> int:
        """Of a micro-batch, where the residual stream is cut along the sequence."""
        return self.tokens // self.tensor if self.sequence_parallel else self.tokens

    @property
    def compute_bytes(self) -> int:
        return _BYTES[self.compute]

    @property
    def residual_bytes(self) -> int:
        return 4 if self.residual == "fp32" else self.compute_bytes

    @property
    def weight_bytes(self) -> int:
        return 4 if self.weights == "fp32" else self.compute_bytes

    @property
    def gradient_bytes(self) -> int:
        return 4 if self.gradients == "fp32" else 2

    @property
    def tensor_group(self) -> Group:
        return Group(self.tensor, 1)

    @property
    def expert_group(self) -> Group:
        return Group(self.expert, 1)

    @property
    def data_group(self) -> Group:
        return Group(self.data, self.tensor)

    @property
    def expert_data_group(self) -> Group:
        return Group(self.expert_data, self.expert)

    @property
    def pipeline_group(self) -> Group:
        return Group(self.pipeline, self.tensor * self.data)


def data_over(devices: int, tensor: int = 1, pipeline: int = 1) -> int:
    """The data parallelism that `devices` leave. Raises ValueError where a device would be left over."""
    model = tensor * pipeline
    if devices < 1 or devices % model:
        raise ValueError(
            f"devices: {devices} is no multiple of tensor {tensor} x pipeline {pipeline} = {model}; use "
            f"{nearest_multiple(devices, model)}"
        )
    return devices // model


def with_global_batch(layout: Layout, sequences: int) -> Layout:
    """`layout` with as many micro-batches as `sequences` per step need. Raises ValueError where they do not fit."""
    portion = layout.data * layout.micro_batch
    if sequences < 1 or sequences % portion:
        raise ValueError(
            f"global_batch: {sequences} is no multiple of data {layout.data} x micro_batch {layout.micro_batch} = "
            f"{portion}; use {nearest_multiple(sequences, portion)}"
        )
    return replace(layout, micro_batches=sequences // portion)


def check(shape: ModelShape, layout: Layout) -> None:
    """Raises ValueError, in one line, where `shape` cannot be laid out so."""
    where, t, experts = f"{shape.name}: layout", layout.tensor, shape.experts
    if shape.heads % t:
        raise ValueError(
            f"{where}.tensor: {t} does not divide {shape.heads} heads; use {nearest_divisor(shape.heads, t)}"
        )
    if shape.latent is None and shape.kv_heads % t and t % shape.kv_heads:
        legal = [d for d in range(1, shape.heads + 1) if shape.heads % d == 0]
        legal = [d for d in legal if shape.kv_heads % d == 0 or d % shape.kv_heads == 0]
        nearest = min(legal, key=lambda d: abs(d - t))
        raise ValueError(f"{where}.tensor: {t} cuts {shape.kv_heads} key/value heads unevenly; use {nearest}")
    if "dense" in shape.kinds and shape.d_ff % t:
        raise ValueError(
            f"{where}.tensor: {t} does not divide d_ff: {shape.d_ff}; use {nearest_divisor(shape.d_ff, t)}"
        )
    stages = layout.pipeline * layout.chunks
    if stages > shape.layers:
        name, most = ("chunks", shape.layers // layout.pipeline) if layout.pipeline <= shape.layers else ("pipeline", 0)
        raise ValueError(
            f"{where}.{name}: pipeline {layout.pipeline} x chunks {layout.chunks} makes {stages} stages of "
            f"{shape.layers} layers; use at most {most or shape.layers}"
        )
    if experts is None:
        if layout.expert > 1:
            raise ValueError(f"{where}.expert: {layout.expert}, but the model has no experts; use 1")
        return
    if experts.experts % layout.expert:
        ranks = layout.tensor * layout.data
        both = [d for d in range(1, experts.experts + 1) if experts.experts % d == 0 and ranks % d == 0]
        nearest = min(both, key=lambda d: (abs(d - layout.expert), d))
        raise ValueError(f"{where}.expert: {layout.expert} does not divide {experts.experts} experts; use {nearest}")
    if t > 1 and not layout.sequence_parallel:
        raise ValueError(
            f"{where}.sequence_parallel: false with tensor: {t} would send every token to its experts {t} times; use "
            "true, or tensor: 1"
        )
    if experts.shared_width % t:
        raise ValueError(
            f"{where}.tensor: {t} does not divide the shared experts' width {experts.shared_width}; use "
            f"{nearest_divisor(experts.shared_width, t)}"
        )
