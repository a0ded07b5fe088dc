"""Our decoder's weights and those of a GPTModel of Megatron-Core, tensor by tensor; imports no Megatron.

Same numbers, other names and another grouping: Megatron has one matrix for queries, keys and values, whose rows go
key/value head by key/value head (its queries, its key, its value), one matrix per expert where we have a stack, and
one for gate and up of a SwiGLU. A `Link` says which part of a tensor of ours is which part of one of theirs; it holds
for weights, for their gradients, and for whatever an optimizer keeps in the shape of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..config import ModelConfig

__all__ = ["Link", "gpt_links", "to_megatron", "to_ours"]

Part = Callable[[Tensor], Tensor]
"""A view of a tensor."""


def _all(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Link:
    """One part of one of our tensors, and what it is in Megatron's model; both views have the same shape."""

    ours: str
    theirs: str
    part: Part = _all
    """Of ours."""
    their_part: Part = _all

    @property
    def is_fused(self) -> bool:
        """Whether theirs holds more than this."""
        return self.their_part is not _all


def gpt_links(
    config: ModelConfig, layers: Sequence[int], num_experts: int, ends: tuple[bool, bool], whole_layers: bool = False
) -> list[Link]:
    """The links of all parameters of one rank's part of the model.

    layers: that the rank holds, in order, by their numbers in the model; Megatron counts them from 0 on each rank.
    num_experts: of those of a layer, held by this rank.
    ends: whether the rank holds the embedding, and the output layer.
    whole_layers: whether MoE layers are ours in Megatron's model too (`megatron_ours.Mixture`).

    Raises ValueError where a layer has no feed-forward network, or norms that Megatron does not have.
    """
    if config.qk_norm == "full":
        raise ValueError("qk_norm: full goes over all heads, Megatron-Core's norms over one; use head or none")
    has_first, has_last = ends
    links = [Link("embedding.weight", "embedding.word_embeddings.weight")] if has_first else []
    for place, layer in enumerate(layers):
        ours, theirs = f"blocks.{layer}", f"decoder.layers.{place}"
        links += _layer(config, layer, ours, theirs)
        if not config.is_moe(layer):
            links += _swiglu(f"{ours}.ffn", f"{theirs}.mlp")
        elif whole_layers:
            links += _our_moe(config, f"{ours}.ffn", f"{theirs}.mlp.layer")
        else:
            links += _their_moe(config, num_experts, f"{ours}.ffn", f"{theirs}.mlp")
    if has_last:
        links.append(Link("norm.weight", "decoder.final_layernorm.weight"))
        if not config.tie_embeddings:
            links.append(Link("head.weight", "output_layer.weight"))
    return links


@torch.no_grad()
def to_megatron(links: Sequence[Link], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Copies our tensors into theirs, of any kind that `links` hold for."""
    for link in links:
        link.their_part(theirs[link.theirs]).copy_(link.part(ours[link.ours]))


@torch.no_grad()
def to_ours(links: Sequence[Link], theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Copies their tensors into ours."""
    for link in links:
        link.part(ours[link.ours]).copy_(link.their_part(theirs[link.theirs]))


def _layer(config: ModelConfig, layer: int, ours: str, theirs: str) -> Iterator[Link]:
    """All but what follows the second norm."""
    if not config.has_ffn(layer):
        raise ValueError(f"per_layer: layer {layer} only attends; every layer of Megatron-Core has a feed-forward part")
    yield Link(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight")
    yield from _attention(config, f"{ours}.attention", f"{theirs}.self_attention")
    yield Link(f"{ours}.ffn_norm.weight", f"{theirs}.pre_mlp_layernorm.weight")


def _our_moe(config: ModelConfig, ours: str, theirs: str) -> Iterator[Link]:
    names = ["router.weight", "experts.gate_up", "experts.down"]
    if config.moe is not None and config.moe.shared_experts:
        names += ["shared.gate.weight", "shared.up.weight", "shared.down.weight"]
    for name in names:
        yield Link(f"{ours}.{name}", f"{theirs}.{name}")


def _their_moe(config: ModelConfig, num_experts: int, ours: str, theirs: str) -> Iterator[Link]:
    yield Link(f"{ours}.router.weight", f"{theirs}.router.weight")
    for expert in range(num_experts):
        own = partial(_nth, expert)
        for name, their_name in (("gate_up", "linear_fc1"), ("down", "linear_fc2")):
            yield Link(f"{ours}.experts.{name}", f"{theirs}.experts.local_experts.{expert}.{their_name}.weight", own)
    if config.moe is not None and config.moe.shared_experts:
        yield from _swiglu(f"{ours}.shared", f"{theirs}.shared_experts")


def _attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[Link]:
    groups, width = config.num_kv_heads, config.head_width
    queries = config.heads // groups
    first = 0
    for name, heads in (("q", queries), ("k", 1), ("v", 1)):
        part = partial(_heads, groups, heads, width)
        their_part = partial(_heads_of_fused, groups, queries + 2, width, first, heads)
        yield Link(f"{ours}.{name}.weight", f"{theirs}.linear_qkv.weight", part, their_part)
        first += heads
    yield Link(f"{ours}.out.weight", f"{theirs}.linear_proj.weight")
    if config.qk_norm == "head":
        for name in "qk":
            yield Link(f"{ours}.{name}_norm.weight", f"{theirs}.{name}_layernorm.weight")


def _swiglu(ours: str, theirs: str) -> Iterator[Link]:
    for half, name in enumerate(("gate", "up")):
        yield Link(f"{ours}.{name}.weight", f"{theirs}.linear_fc1.weight", their_part=partial(_half, half))
    yield Link(f"{ours}.down.weight", f"{theirs}.linear_fc2.weight")


def _nth(index: int, stack: Tensor) -> Tensor:
    return stack[index]


def _half(half: int, fused: Tensor) -> Tensor:
    return fused.chunk(2)[half]


def _heads(groups: int, heads: int, width: int, weight: Tensor) -> Tensor:
    """[groups * heads * width, D] -> [groups, heads, width, D]."""
    return weight.view(groups, heads, width, -1)


def _heads_of_fused(groups: int, heads: int, width: int, first: int, count: int, fused: Tensor) -> Tensor:
    """[groups * heads * width, D] -> heads [first, first + count) of each group, [groups, count, width, D]."""
    return fused.view(groups, heads, width, -1)[:, first : first + count]
