"""The MoE layers of the `kernels` benchmark: shape, weights, routing and tokens, equal for every contender.

Every function here is a pure one of the case, in any process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...moe.config import RouterConfig
from .cases import mixtral_router

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FEW, USUAL = 32, 1024
"""Tokens of a layer."""


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One MoE layer and how many tokens go through it."""

    shape: str
    """Of which model."""
    experts: int
    top_k: int
    d_model: int
    d_expert: int
    tokens: int = USUAL
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights, tokens and gradients."""
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.shape}, {self.tokens} tokens, {self.dtype}"

    @property
    def router(self) -> RouterConfig:
        return mixtral_router(self.top_k)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class LayerWeights(NamedTuple):
    """The weights of one layer, or their gradients; gate rows stand above up rows."""

    gate_ED: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor


def layer_cases() -> list[LayerCase]:
    """Both shapes in both dtypes, at a usual and at a small number of tokens.

    Widths are an eighth of Mixtral-8x7B's and a quarter of Qwen3-30B-A3B's; experts and choices are theirs.
    """
    mixtral = {"shape": "Mixtral-like", "experts": 8, "top_k": 2, "d_model": 512, "d_expert": 1792}
    qwen = {"shape": "Qwen3-30B-A3B-like", "experts": 128, "top_k": 8, "d_model": 512, "d_expert": 192}
    return [
        LayerCase(**shape, tokens=tokens, dtype=dtype)
        for shape in (mixtral, qwen)
        for tokens in (USUAL, FEW)
        for dtype in ("fp32", "bf16")
    ]


def make_layer_weights(case: LayerCase) -> LayerWeights:
    """Weights under which tokens keep their scale, in the case's dtype; gate rows are orthonormal.

    Needs no more experts than `d_model`.
    """
    generator = torch.Generator().manual_seed(case.seed)
    E, D, F = case.experts, case.d_model, case.d_expert

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    gate_DE = torch.linalg.qr(normal(D, E)).Q
    weights = (gate_DE.t().contiguous(), normal(E, 2 * F, D) * D**-0.5, normal(E, D, F) * F**-0.5)
    return LayerWeights(*(weight.to(case.torch_dtype) for weight in weights))


def make_choices(case: LayerCase) -> Tensor:
    """The experts of every token, drawn evenly; int64 [T, K]."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.rand(case.tokens, case.experts, generator=generator).topk(case.top_k).indices


def make_tokens(case: LayerCase) -> tuple[Tensor, Tensor]:
    """Tokens that the gate sends to `make_choices`, and a gradient of the layer's output; both [T, D].

    Logits of chosen experts are at least 1 above all others: also a gate that computes in bf16 chooses them.
    """
    generator = torch.Generator().manual_seed(case.seed + 2)
    size = (case.tokens, case.d_model)
    x_TD, grad_TD = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    logits_TE = 2 * torch.rand(case.tokens, case.experts, generator=generator) - 1
    chosen_TK = 2 + torch.rand(case.tokens, case.top_k, generator=generator)
    logits_TE.scatter_(1, make_choices(case), chosen_TK)
    gate_ED = make_layer_weights(case).gate_ED.float()
    x_TD += (logits_TE - x_TD @ gate_ED.t()) @ gate_ED
    return x_TD.to(case.torch_dtype), grad_TD.to(case.torch_dtype)
