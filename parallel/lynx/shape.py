"""The shape of a decoder-only transformer: all that its work and its memory depend on, and no weights.

Neutral: `huggingface.py` makes it of a config.json, `wastenot simulate` of a run's configuration. Its weights by name
and size are in `weights.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["dense", "moe"]
"""Layers of one kind do the same work."""


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from a small shared vector."""

    kv_rank: int
    """Width of what keys and values are made of."""
    nope_dim: int
    """Width of the part of a head's query and key that is not rotated ..."""
    rope_dim: int
    """... and of the part that is; keys share it between heads."""
    value_dim: int
    query_rank: int = 0
    """Width of what queries are made of; 0 projects them straight from the tokens."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The expert layers."""

    experts: int
    top_k: int
    d_expert: int
    """Hidden width of one routed expert."""
    shared_width: int = 0
    """Hidden width of all shared experts together."""
    groups: int = 1
    """Experts are cut into this many groups ..."""
    top_groups: int = 1
    """... and a token's are of this many at most (group-limited routing)."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model by its sizes."""

    name: str
    vocab: int
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    """Width of a head's query, key and value; with `latent` that says its own."""
    d_ff: int
    """Hidden width of dense feed-forward networks."""
    latent: Latent | None = None
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers without experts, in a model with them."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: over each head, or over all."""
    tied: bool = False
    """Output layer and embedding are one matrix."""
    gated: bool = True
    """SwiGLU with three matrices; otherwise GELU with two."""
    rotary: bool = True
    positions: int = 0
    """Learned position embeddings; 0: none."""
    biases: bool = False
    """All projections have biases and norms have them too (GPT)."""
    dropout: bool = False
    """After attention, its softmax and the feed-forward network; each keeps a mask of a byte per number."""

    def __post_init__(self) -> None:
        for name in ("vocab", "d_model", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.name}: {name}: {getattr(self, name)} is too small; use 1 or more")
        if self.heads % self.kv_heads:
            divisors = [d for d in range(1, self.heads + 1) if self.heads % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - self.kv_heads))
            raise ValueError(
                f"{self.name}: kv_heads: {self.kv_heads} does not divide heads: {self.heads}; use {nearest}"
            )
        if self.experts is not None and not 1 <= self.experts.top_k <= self.experts.experts:
            raise ValueError(
                f"{self.name}: top_k: {self.experts.top_k} of {self.experts.experts} experts; use at least 1 and at "
                f"most {self.experts.experts}"
            )
        beyond = [layer for layer in self.dense_layers if not 0 <= layer < self.layers]
        if beyond:
            raise ValueError(
                f"{self.name}: dense_layers: {beyond[0]} is no layer; they are numbered 0 to {self.layers - 1}"
            )
        if self.d_ff < 1 and "dense" in self.kinds:
            raise ValueError(f"{self.name}: d_ff: {self.d_ff}, but there are dense layers; give their hidden width")

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What each layer is."""
        if self.experts is None:
            return ("dense",) * self.layers
        dense = frozenset(self.dense_layers)
        return tuple("dense" if layer in dense else "moe" for layer in range(self.layers))

    @property
    def qk_dim(self) -> int:
        """Width of a head's query and of its key."""
        return self.head_dim if self.latent is None else self.latent.nope_dim + self.latent.rope_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.head_dim if self.latent is None else self.latent.value_dim
