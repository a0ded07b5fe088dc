"""Megatron-Core's GPTModel from its local layer specification, and its MoE layer alone, on CPU.

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

from ..cases import Case, batch_of, expert_stacks
from ..layer_cases import DTYPES, LayerCase, LayerWeights
from ..layer_step import PeerLayer, gradient_of
from ..step import TrainingStep, token_loss
from .remote import Place

SHIM = Path(__file__).resolve().parents[3] / "tests" / "megatron_cpu_shim.py"


class Megatron(nn.Module):
    """GPTModel that takes tokens and answers with its loss; positions and mask are made once."""

    def __init__(self, model: nn.Module, seq_len: int) -> None:
        super().__init__()
        self.model = model
        self.positions_1S = torch.arange(seq_len).unsqueeze(0)
        self.masked_11SS = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool).triu(1)

    def forward(self, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        positions_BS = self.positions_1S.expand(len(inputs_BS), -1)
        return token_loss(self.model(inputs_BS, positions_BS, self.masked_11SS), targets_BS)


def missing() -> str:
    """Why it cannot be built here, or nothing."""
    return "" if SHIM.exists() else "needs a source checkout (tests/megatron_cpu_shim.py is not part of the package)"


def build(case: Case, weights: dict[str, Tensor]) -> Megatron:
    """The decoder of `case`, its experts shared by all ranks. Patches this process for good.

    Starts a process group of one where there is none.
    """
    shim = _start()
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    shape = case.model.moe
    assert shape is not None
    config = _config(
        DTYPES[case.dtype],
        num_layers=case.model.layers,
        hidden_size=case.model.d_model,
        num_attention_heads=case.model.heads,
        num_query_groups=case.model.num_kv_heads,
        kv_channels=case.model.head_width,
        ffn_hidden_size=shape.d_expert,
        num_moe_experts=shape.experts,
        moe_router_topk=case.top_k,
        layernorm_epsilon=case.model.norm_eps,
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
    _load(model, _state(case, weights))
    return Megatron(model, case.seq_len)


def build_rank(case: Case, weights: dict[str, Tensor], place: Place) -> TrainingStep:
    """The decoder of `case` on one of several ranks, which share its experts, in Megatron's DistributedDataParallel."""
    model = build(case, weights)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    whole: Any = model.model
    with load_shim().devices_on_cpu():
        shared: Any = DistributedDataParallel(
            whole.config, DistributedDataParallelConfig(overlap_grad_reduce=True), whole
        )
    model.model = shared

    def backward(loss: Tensor) -> None:
        shared.zero_grad_buffer()
        loss.backward()
        shared.finish_grad_sync()
        for p in shared.parameters():
            p.grad = p.main_grad

    return TrainingStep(
        model,
        *batch_of(case, place.rank, place.world),
        case.dtype,
        backward=backward,
        is_local=lambda p: not getattr(p, "allreduce", True),
    )


def build_layer(case: LayerCase, weights: LayerWeights) -> PeerLayer:
    """The layer of `case`; its gate computes in fp32 as Megatron advises. Patches and starts as `build` does."""
    shim = _start()
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    config = _config(
        case.torch_dtype,
        num_layers=1,
        hidden_size=case.d_model,
        num_attention_heads=1,
        ffn_hidden_size=case.d_expert,
        num_moe_experts=case.experts,
        moe_router_topk=case.top_k,
        moe_router_dtype="fp32",
    )
    spec: Any = get_moe_module_spec(use_te=False, num_experts=case.experts, moe_grouped_gemm=False)
    with shim.devices_on_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(case.seed)
        layer = spec.module(config, spec.submodules)
    state = {"router.weight": weights.gate_ED}
    _load(layer, state | _expert_state("experts", weights.gate_up_E2FD, weights.down_EDF))
    experts = list(layer.experts.local_experts)

    def gradients() -> LayerWeights:
        return LayerWeights(
            gradient_of(layer.router.weight),
            torch.stack([gradient_of(expert.linear_fc1.weight) for expert in experts]),
            torch.stack([gradient_of(expert.linear_fc2.weight) for expert in experts]),
        )

    # Sequence first.
    return PeerLayer(layer, lambda x_TD: layer(x_TD.unsqueeze(1))[0].squeeze(1), gradients)


def _start() -> Any:
    """Patches this process, and starts a process group of one where there is none; gives the shim."""
    shim = load_shim()
    shim.install()
    from megatron.core import parallel_state

    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    return shim


def _config(dtype: torch.dtype, **shape: Any) -> Any:
    """Megatron's configuration of `shape`: dropless, SwiGLU experts, no fusion that needs CUDA."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **shape,
        expert_model_parallel_size=dist.get_world_size(),
        moe_ffn_hidden_size=shape["ffn_hidden_size"],
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Strict but for the empty extra states that Megatron adds beside each linear layer."""
    found = module.load_state_dict(state, strict=False)
    wrong = found.unexpected_keys + [name for name in found.missing_keys if not name.endswith("_extra_state")]
    assert not wrong, f"Megatron-Core names its weights otherwise than this peer expects: {wrong}"


def load_shim() -> Any:
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
        stacks = expert_stacks(weights, number, shape.experts)
        # This rank's.
        held = (stack.chunk(dist.get_world_size())[dist.get_rank()] for stack in stacks)
        state |= _expert_state(f"{theirs}.mlp.experts", *held)
    return state


def _expert_state(name: str, gate_up_E2FD: Tensor, down_EDF: Tensor) -> dict[str, Tensor]:
    state = {}
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD, down_EDF, strict=True)):
        state[f"{name}.local_experts.{expert}.linear_fc1.weight"] = gate_up_2FD
        state[f"{name}.local_experts.{expert}.linear_fc2.weight"] = down_DF
    return state


def _qkv(case: Case, weights: dict[str, Tensor], layer: str) -> Tensor:
    """One matrix with, for each key/value head in turn, its queries, its keys and its values."""
    groups, width = case.model.num_kv_heads, case.model.d_model
    parts = [weights[f"{layer}.self_attn.{name}_proj.weight"].view(groups, -1, width) for name in "qkv"]
    return torch.cat(parts, dim=1).flatten(0, 1)
