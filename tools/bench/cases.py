"""The decoders of the `train` benchmark: shape, weights and batch, equal for every contender."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...moe.config import ModelConfig, MoEConfig, RouterConfig

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A Mixtral-like decoder and the size of its batch."""

    name: str
    model: ModelConfig
    top_k: int
    dtype: Dtype = "fp32"
    """What matrix products run in; weights, gradients of the optimizer and its state are fp32 in both."""
    batch: int = 8
    """Sequences, over all ranks."""
    seq_len: int = 256
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}"

    @property
    def router(self) -> RouterConfig:
        return mixtral_router(self.top_k)

    @property
    def num_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.seq_len


def in_both_dtypes(cases: list[Case]) -> list[Case]:
    """Each of `cases` in fp32, then in bf16."""
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")
    return [replace(case, dtype=dtype) for case in cases for dtype in dtypes]


def mixtral_router(top_k: int) -> RouterConfig:
    """Mixtral's: softmax over the chosen experts, with gradients through that denominator."""
    return RouterConfig(top_k=top_k, normalize="top_k", detach=False, balance_loss=0.0)


def cases(quick: bool) -> list[Case]:
    """The cases of the benchmark, in fp32; `quick` takes two of three, the second with half its choices per token."""

    def case(name: str, top_k: int, d_model: int, heads: int, experts: int, d_expert: int) -> Case:
        moe = MoEConfig(experts=experts, d_expert=d_expert)
        model = ModelConfig(vocab_size=2048, d_model=d_model, layers=4, heads=heads, kv_heads=heads // 2, moe=moe)
        return Case(name=name, model=model, top_k=top_k)

    first = case("few experts", 2, d_model=256, heads=4, experts=8, d_expert=512)
    if quick:
        return [first, case("fine-grained", 4, d_model=256, heads=4, experts=64, d_expert=128)]
    return [
        first,
        case("fine-grained", 8, d_model=256, heads=4, experts=64, d_expert=128),
        case("wide", 2, d_model=512, heads=8, experts=8, d_expert=1024),
    ]


def make_weights(case: Case) -> dict[str, Tensor]:
    """All weights of `case` under Mixtral's on-disk names, fp32: a pure function of the case, in any process.

    Norm weights differ from 1, so that a peer that forgets one is found out.
    """
    model = case.model
    assert model.moe is not None
    generator = torch.Generator().manual_seed(case.seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * model.init_std

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(model.d_model, generator=generator)

    d_model, d_expert = model.d_model, model.moe.d_expert
    queries, keys = model.heads * model.head_width, model.num_kv_heads * model.head_width
    weights = {"model.embed_tokens.weight": matrix(model.vocab_size, d_model)}
    for number in range(model.layers):
        layer = f"model.layers.{number}"
        weights |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": matrix(queries, d_model),
            f"{layer}.self_attn.k_proj.weight": matrix(keys, d_model),
            f"{layer}.self_attn.v_proj.weight": matrix(keys, d_model),
            f"{layer}.self_attn.o_proj.weight": matrix(d_model, queries),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.block_sparse_moe.gate.weight": matrix(model.moe.experts, d_model),
        }
        for expert in range(model.moe.experts):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            weights[f"{name}.w1.weight"] = matrix(d_expert, d_model)
            weights[f"{name}.w3.weight"] = matrix(d_expert, d_model)
            weights[f"{name}.w2.weight"] = matrix(d_model, d_expert)
    weights["model.norm.weight"] = norm()
    weights["lm_head.weight"] = matrix(model.vocab_size, d_model)
    return weights


def expert_stacks(weights: dict[str, Tensor], layer: int, experts: int) -> tuple[Tensor, Tensor]:
    """Gate and up matrices [E, 2F, D] (gate first) and down matrices [E, D, F] of one layer."""
    names = [f"model.layers.{layer}.block_sparse_moe.experts.{expert}" for expert in range(experts)]
    gate_up = [torch.cat([weights[f"{name}.w1.weight"], weights[f"{name}.w3.weight"]]) for name in names]
    return torch.stack(gate_up), torch.stack([weights[f"{name}.w2.weight"] for name in names])


def make_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, S], int64: a pure function of the case."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    tokens = torch.randint(case.model.vocab_size, (case.batch, case.seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def batch_of(case: Case, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """The part of `make_batch` that `rank` of `world` reads: [B / world, S] each."""
    share = case.batch // world
    inputs_BS, targets_BS = make_batch(case)
    return inputs_BS[rank * share :][:share], targets_BS[rank * share :][:share]
