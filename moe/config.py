"""Shape of the model and behaviour of its router. Torch-free, so that planners read it without torch."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args, get_origin, get_type_hints


def _one_of(owner: object) -> None:
    """Raises ValueError where a field of `owner` that is a Literal holds none of its values."""
    for name, kind in get_type_hints(type(owner)).items():
        choices, value = get_args(kind), getattr(owner, name)
        if get_origin(kind) is Literal and value not in choices:
            close = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.3)
            nearest = f"; nearest: {close[0]}" if close else ""
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}{nearest}")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value < 1:
            raise ValueError(f"{name}: {value} is too small; use 1 or more")


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` (at least 1) nearest to `wanted`; the smaller one of two."""
    low = next(d for d in range(min(wanted, number), 0, -1) if number % d == 0)
    high = next((d for d in range(wanted, min(number, 2 * wanted - low) + 1) if number % d == 0), low)
    return low if wanted - low <= abs(high - wanted) else high


_USUAL = {"rope_theta": "10000", "norm_eps": "1e-6", "init_std": "0.02"}

_MOST_CAPACITY = 1e6
"""Largest capacity factor: a guess, beyond any model's number of experts. At experts / top_k all tokens have slots."""


@dataclass(frozen=True, kw_only=True)
class EmulateConfig:
    """Emulated ranks (METHODS R10): one process routes as `sources` ranks with `owners` expert owners would."""

    sources: int
    """Blocks the global micro-batch is cut into; capacity, priority and auxiliary losses hold per block."""
    owners: int
    """Ranks among which experts are owned; block s owns the experts of rank s mod owners."""

    def __post_init__(self) -> None:
        _positive(self, "sources", "owners")


@dataclass(frozen=True, kw_only=True)
class RectifyConfig:
    """Rectify-Router (METHODS R5-R7, R9; arXiv 2402.12399): no token unserved, fewer slots padded."""

    intra: bool = False
    """Tokens that lost choices to full experts go to the best expert on their own rank (R6)."""
    fill: bool = False
    """Slots that would be padding take tokens' next-best choices (R5)."""
    fill_ranks: int = 1
    """How many choices beyond top_k may fill slots."""
    select: Literal["any", "all"] = "any"
    """`intra` serves tokens that lost any of their choices so that fewer than top_k remain, or all of them."""
    capacity: float | None = None
    """Rows `intra` may add per rank, as a part of its tokens; those beyond it are dropped (R9). With padded dispatch
    all shapes are then static. null sets no bound."""

    def __post_init__(self) -> None:
        _one_of(self)
        _positive(self, "fill_ranks")
        if self.capacity is not None and not 0 < self.capacity <= 1:
            nearest = 1.0 if self.capacity > 1 else 0.25
            raise ValueError(f"capacity: {self.capacity} is outside (0, 1]; use {nearest}, or null for no bound")
        if self.fill_ranks != 1 and not self.fill:
            raise ValueError(f"fill_ranks: {self.fill_ranks} has no effect without fill: true; use 1")
        for name, usual in (("select", "any"), ("capacity", None)):
            if not self.intra and getattr(self, name) != usual:
                shown = "null" if usual is None else usual
                raise ValueError(f"{name}: {getattr(self, name)} has no effect without intra: true; use {shown}")

    @property
    def is_on(self) -> bool:
        return self.intra or self.fill


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Token-choice top-k routing (METHODS R1-R10)."""

    kind: Literal["learned", "uniform", "skewed", "bursty", "replay"] = "learned"
    """All but `learned` ignore the tokens: benchmarks only, and labelled as such in every report."""
    skew: float = 1.0
    """Zipf exponent of `kind: skewed`; how much a burst prefers its expert in `kind: bursty`."""
    trace: str | None = None
    """File of recorded logits that `kind: replay` repeats; `wastenot eval RUN --trace FILE` records one."""
    top_k: int = 2
    """Experts per token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: Literal["survivors", "top_k", "none"] = "survivors"
    """Weights are divided by the sum over surviving choices, over all top-k choices, or not at all (R4)."""
    detach: bool = True
    """Stop the gradient at that denominator (R4)."""
    scale: float = 1.0
    """Factor on every weight, as DeepSeek's routed_scaling_factor."""
    groups: int = 1
    """Experts are cut into this many groups ..."""
    top_groups: int = 1
    """... of which a token may use this many (group-limited routing)."""
    capacity_factor: float | None = None
    """Slots per (source rank, expert) are ceil(top_k * factor * T / E) (R2); null is dropless."""
    priority: Literal["probability", "position"] = "probability"
    """Who gets a slot first when they run out (R3)."""
    jitter: float = 0.0
    """Router inputs are multiplied by uniform noise in [1 - jitter, 1 + jitter] during training."""
    balance_loss: float = 0.01
    """Weight of the load-balancing loss (Switch form, R8)."""
    balance_over: Literal["block", "sequence", "global"] = "block"
    """Tokens over which load is counted: this rank's (or emulated) block, each sequence, the global micro-batch."""
    z_loss: float = 0.0
    """Weight of the router z-loss, mean of logsumexp(logits)^2."""
    bias_update: float = 0.0
    """Step of the auxiliary-loss-free selection bias; 0 switches it off."""
    rectify: RectifyConfig = field(default_factory=RectifyConfig)
    emulate: EmulateConfig | None = None

    def __post_init__(self) -> None:
        _one_of(self)
        _positive(self, "top_k", "groups", "top_groups")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups: {self.top_groups} exceeds groups: {self.groups}; use at most {self.groups}")
        if self.capacity_factor is None and self.rectify.is_on:
            raise ValueError(
                "rectify: nothing is dropped or padded without a capacity_factor; set one, for example 1.0, or "
                "intra: false and fill: false"
            )
        if self.capacity_factor is not None:
            self._check_capacity(self.capacity_factor)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter: {self.jitter} is outside [0, 1); use for example 0.01")
        if self.scale <= 0:
            raise ValueError(f"scale: {self.scale} is not positive; use 1.0 for plain weights")
        if self.skew < 0:
            raise ValueError(f"skew: {self.skew} is negative; use 0 (uniform) or more")
        for name in ("balance_loss", "z_loss", "bias_update"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; use 0 (off) or more")
        if (self.kind == "replay") != (self.trace is not None):
            raise ValueError(
                f"trace: {self.trace} does not go with kind: {self.kind}; kind: replay needs a file, others none"
            )
        if self.num_choices == 1 and self.normalize != "none" and not self.detach:
            raise ValueError(
                "detach: false with top_k: 1 makes every weight a constant 1 and the router learns nothing; "
                "use detach: true or normalize: none"
            )
        if self.emulate is not None and self.jitter > 0:
            raise ValueError("jitter: noise depends on the world size, which emulate excludes; use jitter: 0")

    def _check_capacity(self, factor: float) -> None:
        if factor < 0 or (factor == 0 and not self.rectify.intra):
            raise ValueError(f"capacity_factor: {factor} leaves no slot; use a positive factor or null")
        if factor > _MOST_CAPACITY:
            raise ValueError(
                f"capacity_factor: {factor} makes slots that no token can fill (experts / top_k is enough for all); "
                f"use at most {_MOST_CAPACITY:.0f}, or null"
            )
        if math.isnan(factor):
            raise ValueError(f"capacity_factor: {factor} is not a number; use for example 1.0, or null")

    @property
    def num_choices(self) -> int:
        """K: experts that a token may be routed to, fill-in choices included."""
        return self.top_k + (self.rectify.fill_ranks if self.rectify.fill else 0)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The expert layers of a model."""

    experts: int = 8
    """Routed experts of each MoE layer; of the fullest one where `per_layer` says how many each has."""
    d_expert: int = 1024
    """Hidden width of each routed expert."""
    shared_experts: int = 0
    """Experts that every token uses; computed as one SwiGLU of shared_experts * d_expert hidden units."""
    every: int = 1
    """Of each `every` layers the last is MoE, the others dense."""
    first_dense: int = 0
    """The first layers stay dense, as in DeepSeek-MoE."""
    per_layer: tuple[int, ...] = ()
    """Experts of each layer, where layers differ as compression leaves them; 0: none. Instead of every, first_dense."""
    dense: tuple[int, ...] = ()
    """Layers, of those with 0 in `per_layer`, that are dense. The others with 0 have no feed-forward network and no
    norm before it: they only attend."""
    dispatch: Literal["ragged", "padded"] = "ragged"
    """`ragged` sends the rows there are; `padded` always sends E*C slots: static shapes, needs a capacity_factor."""

    def __post_init__(self) -> None:
        _one_of(self)
        _positive(self, "experts", "d_expert", "every")
        for name in ("shared_experts", "first_dense"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; use 0 or more")
        if self.per_layer:
            self._check_per_layer(self.per_layer)
        elif self.dense:
            raise ValueError(f"dense: {list(self.dense)} has no effect without per_layer; use []")

    def _check_per_layer(self, counts: tuple[int, ...]) -> None:
        if min(counts) < 0:
            raise ValueError(f"per_layer: {min(counts)} is negative; use 0 for a layer without experts")
        # Without any expert no number would be right, and nothing reads it.
        if max(counts) not in (0, self.experts):
            raise ValueError(
                f"experts: {self.experts} is not that of the fullest layer in per_layer; use {max(counts)}"
            )
        for name, usual in (("every", 1), ("first_dense", 0)):
            if getattr(self, name) != usual:
                raise ValueError(f"{name}: {getattr(self, name)} has no effect with per_layer; use {usual}")
        without = [layer for layer, experts in enumerate(counts) if not experts]
        legal = [layer for layer in without if layer in self.dense]
        if list(self.dense) != legal:
            raise ValueError(
                f"dense: {list(self.dense)} is not in order, each once, of the layers {without} that have 0 in "
                f"per_layer; use {legal}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, rotary grouped-query attention, SwiGLU or MoE."""

    vocab_size: int = 0
    """Tokens of the embedding; 0 takes the tokenizer's."""
    d_model: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 0
    """Key/value heads; 0 means as many as heads."""
    d_head: int = 0
    """Width of a head; 0 means d_model / heads."""
    d_ff: int = 0
    """Hidden width of dense SwiGLU layers; 0 means 8/3 d_model, rounded up to a multiple of 16."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: per head (Qwen3), over all heads (OLMoE), or none."""
    tie_embeddings: bool = False
    init_std: float = 0.02
    init_residual: Literal["plain", "depth"] = "depth"
    """`depth` divides the std of layers that write the residual stream by sqrt(2 * layers)."""
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    """null makes every layer dense: the baseline."""

    def __post_init__(self) -> None:
        _one_of(self)
        _positive(self, "d_model", "layers", "heads")
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size: {self.vocab_size} is negative; use 0 to take the tokenizer's")
        for name in ("kv_heads", "d_head", "d_ff"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; use 0 for the default, or more")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive; use for example {_USUAL[name]}")
        if self.d_head == 0 and self.d_model % self.heads:
            nearest = nearest_divisor(self.d_model, self.heads)
            raise ValueError(
                f"heads: {self.heads} does not divide d_model: {self.d_model}; use {nearest}, or set d_head"
            )
        if self.heads % self.num_kv_heads:
            nearest = nearest_divisor(self.heads, self.num_kv_heads)
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads: {self.heads}; use {nearest}")
        if self.head_width % 2:
            raise ValueError(
                f"d_head: {self.head_width} is odd, which rotary embeddings cannot turn; use an even width"
            )
        if self.moe is not None and self.moe.per_layer:
            self._check_per_layer(self.moe.per_layer)

    def _check_per_layer(self, counts: tuple[int, ...]) -> None:
        if len(counts) != self.layers:
            nearest = [*counts[: self.layers], *counts[-1:] * (self.layers - len(counts))]
            raise ValueError(
                f"moe: per_layer: {list(counts)} has {len(counts)} entries for layers: {self.layers}; use for example "
                f"{nearest}, or layers: {len(counts)}"
            )

    @property
    def head_width(self) -> int:
        return self.d_head or self.d_model // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def dense_width(self) -> int:
        return self.d_ff or -(-8 * self.d_model // 3 // 16) * 16

    def num_experts(self, layer: int) -> int:
        """Routed experts of layer number `layer` (from 0); 0: none."""
        moe = self.moe
        if moe is None:
            return 0
        if moe.per_layer:
            return moe.per_layer[layer]
        return moe.experts if layer >= moe.first_dense and (layer + 1) % moe.every == 0 else 0

    def is_moe(self, layer: int) -> bool:
        """Whether layer number `layer` has experts."""
        return self.num_experts(layer) > 0

    def has_ffn(self, layer: int) -> bool:
        """Whether layer number `layer` has experts or a dense SwiGLU; one without only attends."""
        moe = self.moe
        return moe is None or not moe.per_layer or moe.per_layer[layer] > 0 or layer in moe.dense

    def is_dense(self, layer: int) -> bool:
        """Whether layer number `layer` has a dense SwiGLU."""
        return self.has_ffn(layer) and not self.is_moe(layer)

    def nth_moe(self, layer: int) -> int:
        """How many of the layers before `layer` have experts: the number of a MoE layer among those, from 0."""
        return sum(self.is_moe(earlier) for earlier in range(layer))

    @property
    def expert_counts(self) -> dict[int, int]:
        """Number of each layer that has experts, in order -> how many."""
        return {layer: self.num_experts(layer) for layer in range(self.layers) if self.is_moe(layer)}


def dropless(model: ModelConfig, router: RouterConfig) -> tuple[ModelConfig, RouterConfig]:
    """The same model without capacity and what goes with it: what it says of a token does not depend on its batch."""
    if model.moe is not None:
        model = replace(model, moe=replace(model.moe, dispatch="ragged"))
    return model, replace(router, capacity_factor=None, rectify=RectifyConfig(), jitter=0.0, emulate=None)
