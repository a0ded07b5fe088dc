"""Hugging Face transformers' Mixtral and its MoE block, with its own choice of expert implementations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from ..cases import Case, batch_of, expert_stacks
from ..layer_cases import LayerCase, LayerWeights
from ..layer_step import PeerLayer, whole
from ..step import TrainingStep, token_loss
from .remote import Place


class Mixtral(nn.Module):
    """MixtralForCausalLM that answers with its loss alone."""

    def __init__(self, model: MixtralForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return token_loss(self.model(input_ids=inputs_BS).logits, targets_BS)


def build(case: Case, weights: dict[str, Tensor], *, experts: str) -> Mixtral:
    """Mixtral of `case` with `experts` = `eager` (a loop over experts) or `grouped_mm`, attention by SDPA.

    In bf16 `grouped_mm` has bf16 weights: it multiplies in the dtype of its weights, whatever autocast says.
    """
    model = MixtralForCausalLM(_config(case, attn_implementation="sdpa", experts_implementation=experts))
    assert case.model.moe is not None
    state = {name.replace(".block_sparse_moe.", ".mlp."): w for name, w in weights.items() if ".experts." not in name}
    for layer in range(case.model.layers):
        gate_up_EGD, down_EDF = expert_stacks(weights, layer, case.model.moe.experts)
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = gate_up_EGD
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = down_EDF
    model.load_state_dict(state)
    if case.dtype == "bf16" and experts == "grouped_mm":
        # Not `model.to`: frequencies of the positions stay in fp32, as they do in a checkpoint loaded in bf16.
        for p in model.parameters():
            p.data = p.data.bfloat16()
    return Mixtral(model)


def build_rank(case: Case, weights: dict[str, Tensor], place: Place, *, experts: str) -> TrainingStep:
    """The decoder of `case` on one of several ranks that each hold all of it, in torch's DistributedDataParallel."""
    model = DistributedDataParallel(build(case, weights, experts=experts), gradient_as_bucket_view=True)
    return TrainingStep(model, *batch_of(case, place.rank, place.world), case.dtype)


def build_layer(case: LayerCase, weights: LayerWeights, *, experts: str) -> PeerLayer:
    """The MoE block of `case` with `experts` as in `build`."""
    config = MixtralConfig(
        hidden_size=case.d_model,
        intermediate_size=case.d_expert,
        num_experts_per_tok=case.top_k,
        num_local_experts=case.experts,
    )
    config._experts_implementation = experts
    block: Any = MixtralSparseMoeBlock(config).to(case.torch_dtype)
    parameters = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj
    return PeerLayer(block, lambda x_TD: block(x_TD.unsqueeze(0)).squeeze(0), whole(parameters, weights))


def _config(case: Case, **more: Any) -> MixtralConfig:
    model = case.model
    assert model.moe is not None
    return MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.moe.d_expert,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_width,
        max_position_embeddings=case.seq_len,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        num_experts_per_tok=case.top_k,
        num_local_experts=model.moe.experts,
        use_cache=False,
        **more,
    )
