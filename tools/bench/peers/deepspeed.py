"""DeepSpeed's MoE layer inside the decoder of transformers: only the expert layers differ from that peer.

Dropless (`drop_tokens=False`: capacity is the fullest expert's load, the others are padded to it) and without
noise, which is the only setting in which it computes what the others compute.
"""

from __future__ import annotations

import os
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..cases import Case, expert_stacks
from . import huggingface


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

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.moe(x_BSD)[0]


def build(case: Case, weights: dict[str, Tensor]) -> nn.Module:
    """The decoder of `case` with a DeepSpeed MoE in each layer."""
    # Read at import: without it DeepSpeed warns that it had to find out itself.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.moe.layer import MoE

    shape = case.model.moe
    assert shape is not None
    decoder = huggingface.build(case, weights, experts="eager")
    for number, layer in enumerate(decoder.model.model.layers):
        moe = MoE(
            case.model.d_model,
            SwiGLU(case.model.d_model, shape.d_expert),
            num_experts=shape.experts,
            k=case.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        gate_up_EGD, down_EDF = expert_stacks(weights, number, shape.experts)
        state = {"gate.wg.weight": weights[f"model.layers.{number}.block_sparse_moe.gate.weight"]}
        for expert in range(shape.experts):
            state[f"experts.deepspeed_experts.{expert}.gate_up.weight"] = gate_up_EGD[expert]
            state[f"experts.deepspeed_experts.{expert}.down.weight"] = down_EDF[expert]
        moe.deepspeed_moe.load_state_dict(state)
        cast(nn.Module, layer).mlp = Layer(moe)
    return decoder
