"""A GPTModel of Megatron-Core that computes what our decoder does, in the decoder's own memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ...moe.adapters.megatron_names import Link, gpt_links, to_megatron, to_ours
from ...moe.adapters.megatron_ours import Gate, Mixture
from ...moe.decoder import Decoder
from ...moe.layer import MoELayer
from ...moe.routing import Routing
from ...parallel.expert import local_experts
from ...parallel.mesh import Axis, Mesh
from ..config import TrainConfig
from ..precision import compute_dtype


def make_groups(config: TrainConfig, mesh: Mesh) -> bool:
    """Megatron's process groups, over the same ranks as ours; all ranks call it together.

    Returns whether a process group was made here: Megatron wants one also for a rank alone.
    """
    alone = not dist.is_initialized()
    if alone:
        backend = "nccl" if mesh.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=mesh.pipeline.size,
        expert_model_parallel_size=mesh.expert.size,
        distributed_timeout_minutes=timedelta(seconds=config.parallel.timeout_seconds) / timedelta(minutes=1),  # pyright: ignore[reportArgumentType]
        create_gloo_process_groups=False,
    )
    theirs = {
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "stage": parallel_state.get_data_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "expert_data": parallel_state.get_expert_data_parallel_group(),
    }
    for name, group in theirs.items():
        found, ours = dist.get_process_group_ranks(group), _ranks(getattr(mesh, name))
        assert found == ours, f"Megatron-Core's {name} ranks are {found}, ours {ours}"
    return alone


def _ranks(axis: Axis) -> list[int]:
    return [dist.get_rank()] if axis.group is None else dist.get_process_group_ranks(axis.group)


Batch = tuple[Tensor, Tensor]
"""Inputs and targets [B, S] of a micro-batch on this rank; targets below 0 count nothing."""


class MegatronModel(nn.Module):
    """This rank's stage of the GPTModel, in Megatron's DistributedDataParallel."""

    def __init__(self, config: TrainConfig, mesh: Mesh, decoder: Decoder, piece_bytes: int) -> None:
        """Of the weights of `decoder`, whose memory it shares; but what Megatron fuses, or computes in bf16, is a copy,
        which follows at a `refresh`. All ranks build it together."""
        super().__init__()
        self.mesh, self.moe_layers = mesh, decoder.moe_layers
        tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed)
        self.config = transformer_config(config, mesh, decoder)
        model: Any = GPTModel(
            self.config,
            _layers(config, mesh, decoder, self.config, piece_bytes),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.data.seq_len,
            pre_process=decoder.stages.has_first,
            post_process=decoder.stages.has_last,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rope_theta,  # pyright: ignore[reportArgumentType]
        ).to(mesh.device)
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.to(self.config.params_dtype)
        self.links = links_of(config, mesh, decoder)
        self.ours, self.theirs = dict(decoder.named_parameters()), dict(model.named_parameters())
        self.copied = _share(self.links, self.ours, self.theirs)
        self.routers = [module for module in model.modules() if isinstance(module, Gate | Mixture)]
        layers = [module for module in decoder.modules() if isinstance(module, MoELayer)]
        for router, layer in zip(self.routers, layers, strict=True):
            if isinstance(router, Gate):
                router.bias_E = layer.router.bias_E
        # Gradients are sums over ranks: every loss is divided by the counts of the global batch.
        reduction = DistributedDataParallelConfig(
            overlap_grad_reduce=True, grad_reduce_in_fp32=True, bucket_size=config.parallel.bucket_bytes // 4
        )
        self.parallel: Any = DistributedDataParallel(self.config, reduction, model)
        self.config.no_sync_func = self.parallel.no_sync
        self._schedule: Any = get_forward_backward_func()
        S = config.data.seq_len
        self.positions_1S = torch.arange(S, device=mesh.device).unsqueeze(0)
        self.masked_11SS = torch.ones(1, 1, S, S, dtype=torch.bool, device=mesh.device).triu(1)
        self.refresh()

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, list[Routing]]:
        """Of the last stage the loss of each token [B, S] in nats, of others hidden states [S, B, D]; and routings."""
        routings: list[Routing] = []
        for router in self.routers:
            router.on_routing = routings.append
        positions_BS = self.positions_1S.expand_as(tokens_BS)
        # bf16 weights are bf16 here.
        with torch.autocast(self.mesh.device.type, enabled=False):
            return self.parallel(tokens_BS, positions_BS, self.masked_11SS, labels=targets_BS), routings

    def run(
        self, batches: Sequence[Batch], forward: Callable[..., Tensor], tokens: int, forward_only: bool = False
    ) -> list[Tensor]:
        """Megatron's schedule over micro-batches of one shape, each through `forward(inputs, targets)`: this model, or
        what is around it. Gives on the last stage the sum of nats of each, divided by `tokens`; without `forward_only`
        these have been backward too."""

        def step(batches: Iterator[Batch], model: object) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
            inputs_BS, targets_BS = next(batches)
            return forward(inputs_BS, targets_BS), partial(_judge, targets_BS, tokens)

        B, S = batches[0][0].shape
        return self._schedule(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=self.parallel,
            num_microbatches=len(batches),
            seq_length=S,
            micro_batch_size=B,
            forward_only=forward_only,
        )

    def refresh(self) -> None:
        """After a change of our weights: copies of them follow."""
        to_megatron(self.copied, self.ours, self.theirs)

    @torch.no_grad()
    def hand_over(self) -> None:
        """After the last backward: sums gradients over ranks, and leaves them at our weights."""
        self.parallel.finish_grad_sync()
        ours = {name: p.grad for name, p in self.ours.items() if p.grad is not None}
        to_ours(self.links, {name: p.main_grad for name, p in self.theirs.items()}, ours)


def _judge(targets_BS: Tensor, tokens: int, nats_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In Megatron's order: what is minimised, of how many tokens, and what is handed back."""
    counted_BS = targets_BS >= 0
    nats = (nats_BS * counted_BS).sum() / tokens
    return nats, counted_BS.sum().int(), nats.detach()


def links_of(config: TrainConfig, mesh: Mesh, decoder: Decoder) -> list[Link]:
    """Of all parameters of this rank."""
    moe, stages = config.model.moe, decoder.stages
    held = 0 if moe is None else len(local_experts(moe.experts, mesh.expert))
    return gpt_links(config.model, stages.held, held, (stages.has_first, stages.has_last), _is_whole(config))


def _is_whole(config: TrainConfig) -> bool:
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


def _layers(
    config: TrainConfig, mesh: Mesh, decoder: Decoder, theirs: TransformerConfig, piece_bytes: int
) -> TransformerBlockSubmodules:
    """Megatron's specification of the layers that this rank holds."""
    model = config.model
    norms: dict[str, Any] = {"qk_layernorm": theirs.qk_layernorm, "normalization": "RMSNorm"}
    dense: Any = get_gpt_layer_local_spec(**norms)

    def with_gate() -> Any:
        spec: Any = get_gpt_layer_local_spec(theirs.num_moe_experts, moe_grouped_gemm=False, **norms).submodules.mlp
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
        mlp = with_layer(number) if _is_whole(config) else with_gate()
        return replace(dense, submodules=replace(dense.submodules, mlp=mlp))

    specs = [spec_of(number) for number in decoder.stages.held]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=dense.submodules.input_layernorm)


def _share(links: Sequence[Link], ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]) -> list[Link]:
    """Makes their tensors views of ours, but for fused ones and those of another dtype; gives the links of these."""
    named = {link.theirs for link in links}, {link.ours for link in links}
    for found, expected in zip(named, (theirs, ours), strict=True):
        assert found == set(expected), f"without a counterpart: {sorted(found ^ set(expected))}"
    copied = []
    for link in links:
        p, q = ours[link.ours], theirs[link.theirs]
        if link.is_fused or p.dtype != q.dtype:
            copied.append(link)
        else:
            q.data = link.part(p.data)
    return copied
