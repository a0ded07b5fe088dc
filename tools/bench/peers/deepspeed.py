"""DeepSpeed's MoE layer, alone or inside the decoder of transformers: only the expert layers differ from that peer.

Dropless (`drop_tokens=False`: capacity is the fullest expert's load, the others are padded to it) and without
noise, which is the only setting in which it computes what the others compute.
"""

from __future__ import annotations

import os
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cases import Case, batch_of, expert_stacks
from ..layer_cases import LayerCase, LayerWeights
from ..layer_step import PeerLayer, gradient_of
from ..step import TrainingStep, make_adamw
from . import huggingface
from .remote import Place


class SwiGLU(nn.Module):
    """One expert; gate and up are one matrix."""

    def __init__(self, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_expert, bias=False)
        self.down = nn.Linear(d_expert, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """DeepSpeed's MoE that answers with its output alone."""

    def __init__(self, moe: Any) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.moe(x_BSD)[0]


def build(case: Case, weights: dict[str, Tensor], rank: int = 0, world: int = 1) -> nn.Module:
    """The decoder of `case` with a DeepSpeed MoE in each layer, whose experts `world` ranks share."""
    shape = case.model.moe
    assert shape is not None
    decoder = huggingface.build(case, weights, experts="eager")
    for number, layer in enumerate(decoder.model.model.layers):
        gate_ED = weights[f"model.layers.{number}.block_sparse_moe.gate.weight"]
        stacks = LayerWeights(gate_ED, *expert_stacks(weights, number, shape.experts))
        cast(nn.Module, layer).mlp = _layer(stacks, case.top_k, rank, world)
    return decoder


def build_rank(case: Case, weights: dict[str, Tensor], place: Place) -> TrainingStep:
    """The decoder of `case` on one of several ranks, in DeepSpeed's engine, which reduces gradients."""
    # It asks for what its launcher sets.
    os.environ |= {"LOCAL_RANK": str(place.rank), "LOCAL_SIZE": str(place.world)}
    decoder = build(case, weights, place.rank, place.world)
    from deepspeed import initialize  # pyright: ignore[reportAttributeAccessIssue]
    from deepspeed.moe.utils import is_moe_param

    optimizer = make_adamw(decoder)
    share = case.batch // place.world
    engine, *_ = initialize(model=decoder, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": share})
    return TrainingStep(
        engine,
        *batch_of(case, place.rank, place.world),
        case.dtype,
        optimizer=optimizer,
        backward=engine.backward,
        is_local=is_moe_param,
    )


def build_layer(case: LayerCase, weights: LayerWeights) -> PeerLayer:
    """The layer of `case`."""
    layer = _layer(weights, case.top_k)
    moe = layer.moe.deepspeed_moe
    experts = list(moe.experts.deepspeed_experts)

    def gradients() -> LayerWeights:
        return LayerWeights(
            gradient_of(moe.gate.wg.weight),
            torch.stack([gradient_of(expert.gate_up.weight) for expert in experts]),
            torch.stack([gradient_of(expert.down.weight) for expert in experts]),
        )

    return PeerLayer(layer, lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0), gradients)


def _layer(weights: LayerWeights, top_k: int, rank: int = 0, world: int = 1) -> Layer:
    """With `weights`, in their dtype; this rank's experts only."""
    # Read at import: without it DeepSpeed warns that it had to find out itself.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.moe.layer import MoE

    num_experts, d_model, d_expert = weights.down_EDF.shape
    moe = MoE(
        d_model,
        SwiGLU(d_model, d_expert),
        num_experts=num_experts,
        ep_size=world,
        k=top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    ).to(weights.down_EDF.dtype)
    state = {"gate.wg.weight": weights.gate_ED}
    held = num_experts // world
    for expert in range(held):
        state[f"experts.deepspeed_experts.{expert}.gate_up.weight"] = weights.gate_up_E2FD[rank * held + expert]
        state[f"experts.deepspeed_experts.{expert}.down.weight"] = weights.down_EDF[rank * held + expert]
    moe.deepspeed_moe.load_state_dict(state)
    return Layer(moe)
