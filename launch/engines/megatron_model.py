"""A GPTModel of Megatron-Core that computes what our decoder does, in the decoder's own memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ...moe.adapters.megatron_names import Link, gpt_links, to_megatron, to_ours
from ...moe.adapters.megatron_ours import Gate, Mixture
from ...moe.decoder import Decoder
from ...moe.layer import MoELayer
from ...moe.routing import Routing
from ...parallel.expert import local_experts
from ...parallel.mesh import Mesh
from ..config import TrainConfig
from .megatron_spec import has_our_layers, layer_specs, transformer_config

_BUILDING = logging.getLogger("megatron.core.transformer.transformer_layer")

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
        # Of our layer, whose class it need not know.
        _BUILDING.addFilter(lambda record: "Unknown MLP type" not in record.getMessage())
        model: Any = GPTModel(
            self.config,
            layer_specs(config, mesh, decoder, self.config, piece_bytes),  # pyright: ignore[reportArgumentType]
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
            output = self.parallel(tokens_BS, positions_BS, self.masked_11SS, labels=targets_BS)
        for router in self.routers:
            router.on_routing = None
        return output, routings

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
        ours: dict[str, Any] = {name: p.grad for name, p in self.ours.items()}
        to_ours(self.links, {name: p.main_grad for name, p in self.theirs.items()}, ours)


def _judge(targets_BS: Tensor, tokens: int, nats_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In Megatron's order: what is minimised, of how many tokens, and what is handed back."""
    counted_BS = targets_BS >= 0
    nats = nats_BS.where(counted_BS, 0).sum() / tokens
    return nats, counted_BS.sum().int(), nats.detach()


def links_of(config: TrainConfig, mesh: Mesh, decoder: Decoder) -> list[Link]:
    """Of all parameters of this rank."""
    moe, stages = config.model.moe, decoder.stages
    held = 0 if moe is None else len(local_experts(moe.experts, mesh.expert))
    return gpt_links(config.model, stages.held, held, (stages.has_first, stages.has_last), has_our_layers(config))


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
