"""wastenot's own decoder, as the trainer builds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....moe.decoder import Decoder, build_decoder
from ....parallel.mesh import single
from ..cases import Case, expert_stacks


class Own(nn.Module):
    """Decoder that answers with its loss alone."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return self.decoder.loss_sum(self.decoder(inputs_BS).hidden_BSD, targets_BS) / targets_BS.numel()


def build(case: Case, weights: dict[str, Tensor]) -> Own:
    """The decoder of `case` on one rank."""
    decoder = build_decoder(case.model, case.router, single())
    state = _state(case, weights)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(state[name])
    return Own(decoder)


def _state(case: Case, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    assert case.model.moe is not None
    state = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "head.weight": weights["lm_head.weight"],
    }
    for number in range(case.model.layers):
        ours, theirs = f"blocks.{number}", f"model.layers.{number}"
        gate_up_EGD, down_EDF = expert_stacks(weights, number, case.model.moe.experts)
        state |= {
            f"{ours}.attention_norm.weight": weights[f"{theirs}.input_layernorm.weight"],
            f"{ours}.attention.q.weight": weights[f"{theirs}.self_attn.q_proj.weight"],
            f"{ours}.attention.k.weight": weights[f"{theirs}.self_attn.k_proj.weight"],
            f"{ours}.attention.v.weight": weights[f"{theirs}.self_attn.v_proj.weight"],
            f"{ours}.attention.out.weight": weights[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.ffn_norm.weight": weights[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.ffn.router.weight": weights[f"{theirs}.block_sparse_moe.gate.weight"],
            f"{ours}.ffn.experts.gate_up": gate_up_EGD,
            f"{ours}.ffn.experts.down": down_EDF,
        }
    return state
