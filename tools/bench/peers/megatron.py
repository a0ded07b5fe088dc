"""Megatron-Core's GPTModel from its local layer specification, on CPU.

It runs through `tests/megatron_cpu_shim.py`, which patches torch for the whole process: build it in a process
of its own (see remote.py). Expert and activation fusions that need CUDA are off.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..cases import Case, expert_stacks
from ..step import token_loss

SHIM = Path(__file__).parents[3] / "tests" / "megatron_cpu_shim.py"


class Megatron(nn.Module):
    """GPTModel that takes tokens and answers with its loss; positions and mask are made once."""

    def __init__(self, model: nn.Module, batch: int, seq_len: int) -> None:
        super().__init__()
        self.model = model
        self.positions_BS = torch.arange(seq_len).expand(batch, -1)
        self.masked_11SS = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool).triu(1)

    def forward(self, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return token_loss(self.model(inputs_BS, self.positions_BS, self.masked_11SS), targets_BS)


def missing() -> str:
    """Why it cannot be built here, or nothing."""
    return "" if SHIM.exists() else "needs a source checkout (tests/megatron_cpu_shim.py is not part of the package)"


def build(case: Case, weights: dict[str, Tensor]) -> Megatron:
    """The decoder of `case`. Patches this process for good, and starts a process group of one."""
    shim = _load_shim()
    shim.install()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    shape = case.model.moe
    assert shape is not None
    config = TransformerConfig(
        num_layers=case.model.layers,
        hidden_size=case.model.d_model,
        num_attention_heads=case.model.heads,
        num_query_groups=case.model.num_kv_heads,
        kv_channels=case.model.head_width,
        ffn_hidden_size=shape.d_expert,
        moe_ffn_hidden_size=shape.d_expert,
        num_moe_experts=shape.experts,
        moe_router_topk=case.top_k,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        layernorm_epsilon=case.model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )
    with shim.devices_on_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(case.seed)
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(shape.experts, moe_grouped_gemm=False, normalization="RMSNorm"),
            vocab_size=case.model.vocab_size,
            max_sequence_length=case.seq_len,
            position_embedding_type="rope",
            rotary_base=int(case.model.rope_theta),
            share_embeddings_and_output_weights=False,
        )
    # Strict but for the empty extra states that Megatron adds beside each linear layer.
    found = model.load_state_dict(_state(case, weights), strict=False)
    wrong = found.unexpected_keys + [name for name in found.missing_keys if not name.endswith("_extra_state")]
    assert not wrong, f"Megatron-Core names its weights otherwise than this peer expects: {wrong}"
    return Megatron(model, case.batch, case.seq_len)


def _load_shim() -> Any:
    spec = importlib.util.spec_from_file_location("megatron_cpu_shim", SHIM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _state(case: Case, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    shape = case.model.moe
    assert shape is not None
    state = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "output_layer.weight": weights["lm_head.weight"],
    }
    for number in range(case.model.layers):
        theirs, ours = f"decoder.layers.{number}", f"model.layers.{number}"
        state |= {
            f"{theirs}.input_layernorm.weight": weights[f"{ours}.input_layernorm.weight"],
            f"{theirs}.self_attention.linear_qkv.weight": _qkv(case, weights, ours),
            f"{theirs}.self_attention.linear_proj.weight": weights[f"{ours}.self_attn.o_proj.weight"],
            f"{theirs}.pre_mlp_layernorm.weight": weights[f"{ours}.post_attention_layernorm.weight"],
            f"{theirs}.mlp.router.weight": weights[f"{ours}.block_sparse_moe.gate.weight"],
        }
        gate_up_EGD, down_EDF = expert_stacks(weights, number, shape.experts)
        for expert in range(shape.experts):
            name = f"{theirs}.mlp.experts.local_experts.{expert}"
            state[f"{name}.linear_fc1.weight"] = gate_up_EGD[expert]
            state[f"{name}.linear_fc2.weight"] = down_EDF[expert]
    return state


def _qkv(case: Case, weights: dict[str, Tensor], layer: str) -> Tensor:
    """One matrix with, for each key/value head in turn, its queries, its keys and its values."""
    groups, width = case.model.num_kv_heads, case.model.d_model
    parts = [weights[f"{layer}.self_attn.{name}_proj.weight"].view(groups, -1, width) for name in "qkv"]
    return torch.cat(parts, dim=1).flatten(0, 1)
