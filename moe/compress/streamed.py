"""A trained model as layers that are read one at a time: what profiling and evaluation of plans run on.

Behind it stands a run of ours (`native.py`) or a Hugging Face checkpoint (`stock.py`). A layer is taken apart where
the methods cut: attention, norm, router, experts. Nothing here trains; everything is in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .plan import Shape

__all__ = ["Choice", "ExpertWeights", "LayerSize", "StreamedLayer", "StreamedModel"]


@dataclass(frozen=True)
class Choice:
    """What a router says of its tokens, dropless."""

    experts_TK: Tensor
    """int64: chosen experts, numbered among those that the layer was read with."""
    weights_TK: Tensor
    """fp32: the weights as the model applies them."""
    probs_TE: Tensor
    """fp32: scores that sum to one over the experts."""


@dataclass(frozen=True)
class ExpertWeights:
    """SwiGLU experts that this rank holds: the layer's, or its consecutive share of them."""

    gate_up: Tensor
    """[e, 2F, D]: gate rows above up rows."""
    down: Tensor
    """[e, D, F]."""


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """Elements of a layer's weights."""

    attention: int
    """With the norm before it: what is left after Layer Drop."""
    feed: int
    """Norm and shared experts, or a dense network; without routed experts."""
    expert: int
    """One routed expert, with its row of the router."""
    num_experts: int
    hidden: int
    """F of its routed experts or of its dense network; 0 where it only attends."""

    @property
    def whole(self) -> int:
        return self.attention + self.feed + self.num_experts * self.expert


class StreamedLayer(Protocol):
    """One layer in memory: h -> a = attend(h) -> a + what its feed-forward network makes of norm(a)."""

    num_experts: int
    """E experts it was read with, over all ranks; 0: dense, or none."""
    is_dense: bool
    """Whether `dense` stands where experts would. With neither the layer only attends."""
    experts: ExpertWeights | None

    def attend(self, h_BSD: Tensor) -> Tensor:
        """The residual stream after attention, causal; positions count from 0."""
        ...

    def norm(self, a_BSD: Tensor) -> Tensor:
        """What the router and the experts read."""
        ...

    def route(self, x_TD: Tensor) -> Choice: ...

    def shared(self, x_TD: Tensor) -> Tensor | None:
        """What the shared experts add, their gate included; None where there are none."""
        ...

    def dense(self, x_TD: Tensor) -> Tensor: ...


class StreamedModel(Protocol):
    """A checkpoint, read layer by layer."""

    shape: Shape
    d_model: int
    vocab_size: int

    @property
    def fingerprint(self) -> str:
        """Of the weights and of what the configuration makes of them."""
        ...

    def embed(self, tokens_BS: Tensor) -> Tensor: ...

    def layer(
        self, number: int, kept: Sequence[int] | None = None, share: tuple[int, int] = (0, 1), feed: bool = True
    ) -> StreamedLayer:
        """Reads a layer. `kept`: with these experts and router rows only, in this order; None: all. `share` (r, n): of
        those kept, experts of the r-th of n equal consecutive parts. `feed` false: attention alone.

        Raises ValueError where the files are damaged, or n does not divide the experts kept.
        """
        ...

    def logits(self, h_BSD: Tensor) -> Tensor:
        """Final norm and output layer."""
        ...

    @property
    def outside_size(self) -> int:
        """Elements of embedding, final norm and output layer."""
        ...

    @property
    def element_bytes(self) -> int:
        """Of a weight on disk."""
        ...

    def size(self, number: int) -> LayerSize: ...
