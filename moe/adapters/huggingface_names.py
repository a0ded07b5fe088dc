"""Our weights under the names that Hugging Face checkpoints use on disk, one to one.

Only the expert stacks differ in more than their name: on disk every expert has three matrices of its own, here all
gate matrices stand above the up matrices in one tensor. A `Piece` says which part of which weight a tensor on disk
is, so reading and writing share one table. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Family = Literal["mixtral", "qwen3_moe", "olmoe", "deepseek", "llama"]
"""Naming schemes, called after the `model_type` of config.json; `deepseek` is that of DeepSeek-MoE-16B. The models of
`llama` are dense."""

FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Piece:
    """One tensor on disk as a part of one of our weights."""

    name: str
    """On disk."""
    weight: str
    """The parameter of ours."""
    expert: int | None
    """Which of all experts it belongs to; None where the weight has no expert dimension."""
    rows: slice
    """Its rows in the weight, or in the expert's part of it."""
    shape: tuple[int, ...]

    def of(self, weight: Tensor, first_expert: int = 0) -> Tensor:
        """This piece as a view of `weight`, which holds the experts from `first_expert` on."""
        if self.expert is None:
            return weight[self.rows]
        return weight[self.expert - first_expert, self.rows]


@dataclass(frozen=True)
class _Spelling:
    """How a family calls what families call differently."""

    moe: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    norms_queries: bool = False
    has_experts: bool = True
    has_dense_layers: bool = False
    has_shared_experts: bool = False


_SPELLINGS: dict[Family, _Spelling] = {
    "mixtral": _Spelling(moe="block_sparse_moe", gate="w1", up="w3", down="w2"),
    "qwen3_moe": _Spelling(norms_queries=True, has_dense_layers=True),
    "olmoe": _Spelling(norms_queries=True),
    "deepseek": _Spelling(has_dense_layers=True, has_shared_experts=True),
    "llama": _Spelling(has_experts=False, has_dense_layers=True),
}

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_QUERY_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
_DENSE = {f"ffn.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_SHARED = {f"ffn.shared.{part}": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}


def has_experts(family: Family) -> bool:
    """Whether models of `family` are mixtures of experts; the others are dense."""
    return _SPELLINGS[family].has_experts


def pieces(name: str, shape: Sequence[int], family: Family, first_expert: int = 0) -> Iterator[Piece]:
    """The tensors on disk that our weight `name` of `shape` consists of, in order.

    An expert weight [e, ...] holds the experts from `first_expert` on. Raises ValueError where the family has no
    such weight.
    """
    spelling = _spelling(family)
    in_block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if in_block is None:
        if name not in _OUTSIDE:
            raise _no_name(name, family)
        yield _whole(_OUTSIDE[name], name, shape)
        return
    layer, rest = f"model.layers.{in_block[1]}", in_block[2]
    if spelling.has_experts and rest in ("ffn.experts.gate_up", "ffn.experts.down"):
        yield from _experts(f"{layer}.{spelling.moe}.experts", name, tuple(shape), spelling, first_expert)
        return
    known = _names_in_block(spelling).get(rest.removesuffix(".weight"))
    if known is None or not rest.endswith(".weight"):
        raise _no_name(name, family)
    yield _whole(f"{layer}.{known}.weight", name, shape)


def to_huggingface(name: str, tensor: Tensor, family: Family, first_expert: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Our weight as the (name on disk, tensor) it is stored as: views, one at a time.

    Of an expert weight `tensor` may hold a rank's share, the experts from `first_expert` on. Raises ValueError
    where the family has no such weight.
    """
    for piece in pieces(name, tensor.shape, family, first_expert):
        yield piece.name, piece.of(tensor, first_expert)


def _experts(prefix: str, name: str, shape: tuple[int, ...], spelling: _Spelling, first_expert: int) -> Iterator[Piece]:
    num_experts, num_rows, width = shape
    if name.endswith("down"):
        parts = [(spelling.down, slice(0, num_rows))]
    else:
        half = num_rows // 2
        parts = [(spelling.gate, slice(0, half)), (spelling.up, slice(half, num_rows))]
    for expert in range(first_expert, first_expert + num_experts):
        for part, rows in parts:
            yield Piece(f"{prefix}.{expert}.{part}.weight", name, expert, rows, (rows.stop - rows.start, width))


def _whole(disk_name: str, name: str, shape: Sequence[int]) -> Piece:
    return Piece(disk_name, name, None, slice(0, shape[0]), tuple(shape))


def _names_in_block(spelling: _Spelling) -> dict[str, str]:
    """Stems of the weights of one block, ours to theirs, but for the experts."""
    names = dict(_IN_BLOCK)
    if spelling.has_experts:
        names["ffn.router"] = f"{spelling.moe}.gate"
    if spelling.norms_queries:
        names |= _QUERY_NORMS
    if spelling.has_dense_layers:
        names |= _DENSE
    if spelling.has_shared_experts:
        names |= _SHARED
    return names


def _spelling(family: str) -> _Spelling:
    if family not in _SPELLINGS:
        raise ValueError(f"family: {family!r} is unknown; use one of {', '.join(FAMILIES)}")
    return _SPELLINGS[family]


def _no_name(name: str, family: str) -> ValueError:
    return ValueError(f"{name}: models of the {family} family have no such weight")
