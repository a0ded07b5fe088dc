"""Our model in Megatron-Core's words: its configuration, and the specification of its layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ...moe.adapters.megatron_ours import Gate, Mixture
from ...moe.decoder import Decoder
from ...moe.layer import MoELayer
from ...parallel.mesh import Mesh
from ..config import TrainConfig
from ..precision import compute_dtype


def has_our_layers(config: TrainConfig) -> bool:
    """Whether MoE layers are ours as a whole, or Megatron's behind our router."""
    return config.megatron.layer == "wastenot"


def transformer_config(config: TrainConfig, mesh: Mesh, decoder: Decoder) -> TransformerConfig:
    """Ours in Megatron's words. Fusions that want TransformerEngine or apex are off."""
    model, moe, router = config.model, config.model.moe, config.router
    dtype = compute_dtype(config.train.precision)
    experts: dict[str, Any] = {}
    if moe is not None:
        experts = {
            "num_moe_experts": moe.experts,
            "moe_ffn_hidden_size": moe.d_expert,
            "moe_shared_expert_intermediate_size": moe.shared_experts * moe.d_expert or None,
            "moe_layer_freq": [int(model.is_moe(layer)) for layer in range(model.layers)],
            "moe_router_topk": router.top_k,
            # Asked for with one choice, and nothing to a router that is ours.
            "moe_router_pre_softmax": True,
            "moe_router_dtype": "fp32",
            # Our gate drops. With a factor set, the dispatcher counts the rows that are left.
            "moe_expert_capacity_factor": router.capacity_factor,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": mesh.expert.size,
        }
    if mesh.pipeline.size > 1:
        stages = [["decoder"] * len(layers) for layers in decoder.stages.layers]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        experts |= {
            "pipeline_model_parallel_size": mesh.pipeline.size,
            "pipeline_model_parallel_layout": stages,
            "pipeline_dtype": dtype,
        }
    return TransformerConfig(
        **experts,
        num_layers=model.layers,
        hidden_size=model.d_model,
        num_attention_heads=model.heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_width,
        ffn_hidden_size=model.dense_width,
        qk_layernorm=model.qk_norm == "head",
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The weights are there already.
        perform_initialization=False,
        # Gradients are summed, not averaged.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )


def layer_specs(
    config: TrainConfig, mesh: Mesh, decoder: Decoder, theirs: TransformerConfig, piece_bytes: int
) -> TransformerBlockSubmodules:
    """Megatron's specification of the layers that this rank holds."""
    model = config.model
    norms: dict[str, Any] = {"qk_layernorm": theirs.qk_layernorm, "normalization": "RMSNorm"}
    dense: Any = get_gpt_layer_local_spec(**norms)

    def with_gate() -> Any:
        layer: Any = get_gpt_layer_local_spec(theirs.num_moe_experts, moe_grouped_gemm=False, **norms)
        spec = layer.submodules.mlp
        gate = partial(Gate, router=config.router, mesh=mesh, backend=config.kernels)
        return replace(spec, submodules=replace(spec.submodules, router=gate))

    def with_layer(number: int) -> Any:
        like = decoder.blocks.get_submodule(str(number)).ffn
        assert model.moe is not None
        make = partial(
            MoELayer, model.d_model, model.moe, config.router, mesh, piece_bytes, config.kernels, model.nth_moe(number)
        )
        return ModuleSpec(Mixture, {"layer": like, "make": make})

    def spec_of(number: int) -> Any:
        if not model.is_moe(number):
            return dense
        mlp = with_layer(number) if has_our_layers(config) else with_gate()
        return replace(dense, submodules=replace(dense.submodules, mlp=mlp))

    specs = [spec_of(number) for number in decoder.stages.held]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=dense.submodules.input_layernorm)
