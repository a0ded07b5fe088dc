"""Our MoE layer inside a GPT model of Megatron-Core (0.16): Rectify-Router, our dispatcher and our kernels.

    spec = wastenot_spec(get_gpt_layer_local_spec(num_experts=8), RectifyConfig(intra=True, fill=True))
    model = GPTModel(config, spec, ...)

Everything is read from Megatron's own TransformerConfig and process groups; what cannot be honoured is refused by its
name. Still Megatron's: the gate's weights, balancing and z-losses, expert bias, input jitter and shared experts. Ours:
what becomes of each choice, the exchange (always one all-to-all, whatever `moe_token_dispatcher_type`) and the
experts, as two stacks. Logits are fp32 at least. Checkpoints have the names and shapes of Megatron's SequentialMLP and
grouped experts: either layer loads what the other saved, at any number of expert-parallel ranks.

`megatron.rectify_spec` is the smaller change: our router in Megatron's own layer.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalCall=false, reportOptionalMemberAccess=false
# Megatron's configuration says of what it has filled in that it may be None.

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.backend import Backend
from ...kernels.gate import gate
from ..config import RectifyConfig
from ..experts import GroupedExperts
from ..mixture import Mixer
from ..routing import Routing
from .megatron import RectifyRouter, check_choices, replaced, routings_of
from .megatron_config import Normalize
from .megatron_mesh import default_groups, mesh_of

try:
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer, MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.utils import sharded_state_dict_default
    from megatron.core.utils import get_pg_rank, get_pg_size
except ImportError as error:
    raise ImportError(
        "wastenot.moe.adapters.megatron_layer needs Megatron-Core; pip install 'wastenot[megatron]'"
    ) from error

__all__ = ["MixtureRouter", "WastenotMoELayer", "routings_of", "wastenot_spec"]

_PLAIN = RectifyConfig()


def wastenot_spec(
    spec: Any,
    rectify: RectifyConfig = _PLAIN,
    *,
    normalize: Normalize | None = None,
    backend: Backend = "auto",
    pg_collection: ProcessGroupCollection | None = None,
) -> Any:
    """`spec` with `WastenotMoELayer` in place of every MoE layer in it; the one given stays as it is.

    spec: of a transformer block, layer or MoE layer: a ModuleSpec, or the dataclass of submodules inside one.
    rectify: what happens to tokens that lose choices, and to empty slots; needs `moe_expert_capacity_factor`.
    normalize: as in `megatron.rectify_spec`.
    pg_collection: process groups, which Megatron hands only to layers it knows; None: those of `parallel_state`.

    Raises ValueError where `spec` has no MoE layer, or one that is not Megatron's own.
    """
    params = {"rectify": rectify, "normalize": normalize, "backend": backend, "pg_collection": pg_collection}

    def with_layer(node: Any) -> Any:
        if not isinstance(node, ModuleSpec) or not isinstance(node.submodules, MoESubmodules):
            return node
        if node.module not in (MoELayer, WastenotMoELayer):
            raise ValueError(f"spec: has {node.module} as a MoE layer; wastenot_spec replaces Megatron's MoELayer")
        if node.submodules.router is not TopKRouter:
            raise ValueError(
                f"spec: has {getattr(node.submodules.router, 'module', node.submodules.router)} as a router already; "
                "wastenot_spec brings its own: give it a specification with Megatron's TopKRouter"
            )
        return ModuleSpec(WastenotMoELayer, params, node.submodules, node.metainfo)

    return replaced(spec, with_layer)


class MixtureRouter(RectifyRouter):
    """Megatron's TopKRouter that answers with our `Routing`; it has the same state."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        rectify: RectifyConfig,
        normalize: Normalize | None = None,
        backend: Backend = "auto",
    ) -> None:
        """Raises ValueError where `config` asks for what our layer does not do."""
        super().__init__(config, pg_collection, rectify, normalize)
        self.backend: Backend = backend

    @staticmethod
    def check(config: TransformerConfig, rectify: RectifyConfig) -> None:
        """Raises ValueError where `config` asks for what our layer does not do."""
        _check(config, rectify)

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E] in fp32, or fp64 with `moe_router_dtype: fp64`."""
        weight_ED = self.weight.double() if self.config.moe_router_dtype == "fp64" else self.weight
        return gate(input.flatten(0, -2), weight_ED, 1, self.backend).view(*input.shape[:-1], -1)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Routing, Tensor]:
        """The routing of logits [S, B, E], and Megatron's own choices before any was dropped, [T, E]."""
        # Megatron's own: losses hung on the weights, counts for the bias, and no capacity.
        stock_TE, chosen_TE = TopKRouter.routing(self, logits, padding_mask)
        dropless = logits.size(0) == 1 and not self.training
        routing = self.decide(logits.flatten(0, 1), chosen_TE, dropless)
        if self.on_routing is not None:
            self.on_routing(routing)
        # Its losses stay in the graph, with a zero gradient.
        hung = 0 * stock_TE.sum().to(routing.weights_TK.dtype)
        return replace(routing, weights_TK=routing.weights_TK + hung), chosen_TE


class WastenotMoELayer(BaseMoELayer):
    """Our router, exchange and experts as a MoE layer of Megatron's: [S, B, D] -> ([S, B, D], no bias)."""

    router: MixtureRouter

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        rectify: RectifyConfig = _PLAIN,
        normalize: Normalize | None = None,
        backend: Backend = "auto",
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """`submodules`: of these only the shared experts are built.

        Raises ValueError where `config` or the process groups ask for what this layer does not do.
        """
        groups = pg_collection or default_groups()
        super().__init__(config, layer_number, groups)
        if get_pg_size(groups.tp) > 1 and not config.sequence_parallel:
            raise ValueError(
                "sequence_parallel: False lets tensor-parallel ranks route the same tokens again and again; use True"
            )
        on_host = config.use_cpu_initialization or not torch.cuda.is_available()
        device = torch.device("cpu" if on_host else torch.cuda.current_device())
        mesh = mesh_of(groups, device)
        self.router = MixtureRouter(config, groups, rectify, normalize, backend)
        width = config.moe_ffn_hidden_size or config.ffn_hidden_size
        self.experts = GroupedExperts(self.num_local_experts, config.hidden_size, width, backend)
        self._place_experts(device)
        dispatch = "padded" if config.moe_pad_expert_input_to_capacity else "ragged"
        self._mixer = Mixer(self.router.num_experts, self.router.routing_config, mesh, dispatch, backend=backend)
        if self.use_shared_expert:
            gated = config.moe_shared_expert_gate
            self.shared_experts = build_module(
                submodules.shared_experts, config=config, pg_collection=groups, gate=gated
            )
        self._expert_data = groups.expt_dp
        self._recomputed = config.recompute_granularity == "selective" and "moe" in config.recompute_modules

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """The layer's output, shaped like `hidden_states`, and no bias; `padding_mask` [B, S] as Megatron has it."""
        if intermediate_tensors is not None:
            raise ValueError(
                "intermediate_tensors: this layer runs as a whole; use overlap_moe_expert_parallel_comm=False"
            )
        mask_SB = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        if self._recomputed:
            return tensor_parallel.checkpoint(self._forward, False, hidden_states, mask_SB), None
        return self._forward(hidden_states, mask_SB), None

    def _forward(self, x_SBD: Tensor, mask_SB: Tensor | None) -> Tensor:
        routing, _ = self.router(x_SBD, mask_SB)
        shared = None
        if self.shared_experts is not None:
            # Megatron's wants sequences: it may gather them over tensor ranks.
            shared = lambda x_TD: self.shared_experts(x_TD.view_as(x_SBD)).flatten(0, -2)  # noqa: E731
        return self._mixer(x_SBD.flatten(0, -2), routing, self.experts, shared).view_as(x_SBD)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Under the names of Megatron's experts: each stack is this rank's share of [..., E, 2F, D] or [..., E, D, F].

        Raises ValueError for one tensor per expert, the metadata flag `singleton_local_shards`.
        """
        if (metadata or {}).get("singleton_local_shards"):
            raise ValueError("singleton_local_shards: True keeps each expert apart; use False")
        found: dict[str, Any] = {}
        for name, module in self.named_children():
            if module is not self.experts:
                path = f"{prefix}{name}."
                found.update(sharded_state_dict_default(module, path, sharded_offsets, metadata, self.attn_tp_group))
        experts = (len(sharded_offsets), get_pg_rank(self.ep_group), get_pg_size(self.ep_group))
        for name, theirs in (("gate_up", "linear_fc1"), ("down", "linear_fc2")):
            found[f"{prefix}experts.{name}"] = ShardedTensor.from_rank_offsets(
                f"{prefix}experts.experts.{theirs}.weight",
                getattr(self.experts, name),
                *sharded_offsets,
                experts,
                replica_id=(0, 0, get_pg_rank(self._expert_data)),
                prepend_axis_num=len(sharded_offsets),
            )
        return found

    @torch.no_grad()
    def _place_experts(self, device: torch.device) -> None:
        """Gives the stacks memory, first values and what Megatron's wrappers look for."""
        config = self.config
        for name, init in (("gate_up", config.init_method), ("down", config.output_layer_init_method)):
            shape = getattr(self.experts, name).shape
            stack = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
            if config.perform_initialization and device.type == "cpu":
                # Every rank draws all experts: the same model whatever the layout.
                held = self.local_expert_indices
                for expert in range(self.router.num_experts):
                    drawn = init(torch.empty(shape[1:], dtype=config.params_dtype))
                    if expert in held:
                        stack[expert - held[0]].copy_(drawn)
            elif config.perform_initialization:
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    for matrix in stack:
                        init(matrix)
            # Read by its DistributedDataParallel and optimizers: gradients are summed over expert_data only. With one
            # expert-parallel rank too, where Megatron's own differ: the optimizer's state then loads at any number.
            stack.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
            setattr(self.experts, name, stack)


def _check(config: TransformerConfig, rectify: RectifyConfig) -> None:
    """Raises ValueError where `config` asks for what our layer does not do."""
    if rectify.is_on and config.moe_expert_capacity_factor is None:
        raise ValueError(
            "moe_expert_capacity_factor: None drops nothing, and nothing is left to rectify; set one, for example 1.0, "
            "or RectifyConfig()"
        )
    check_choices(config, rectify)
    refused = {
        "activation_func": (config.activation_func is not F.silu, "F.silu with gated_linear_unit=True"),
        "gated_linear_unit": (not config.gated_linear_unit, "True with activation_func=F.silu"),
        "glu_linear_offset": (config.glu_linear_offset != 0, "0.0"),
        "activation_func_clamp_value": (config.activation_func_clamp_value is not None, "None"),
        "add_bias_linear": (config.add_bias_linear, "False"),
        "moe_token_dispatcher_type": (config.moe_token_dispatcher_type == "flex", "alltoall"),
        "moe_latent_size": (config.moe_latent_size is not None, "None"),
        "moe_apply_probs_on_input": (config.moe_apply_probs_on_input, "False"),
        "moe_shared_expert_overlap": (config.moe_shared_expert_overlap, "False: they overlap with dispatch anyway"),
        "moe_router_padding_for_quantization": (bool(config.moe_router_padding_for_quantization), "False"),
        "fp8": (bool(config.fp8), "None, and bf16=True"),
        "fp4": (bool(config.fp4), "None, and bf16=True"),
        "overlap_moe_expert_parallel_comm": (config.overlap_moe_expert_parallel_comm, "False"),
        "cuda_graph_impl": (config.cuda_graph_impl != "none", "none"),
    }
    for name, (is_refused, use) in refused.items():
        if is_refused:
            raise ValueError(f"{name}: {getattr(config, name)!r} is not for wastenot's MoE layer; use {use}")
    selective = config.recompute_granularity == "selective"
    apart = {"moe_act", "shared_experts"} & set(config.recompute_modules or ()) if selective else set()
    if config.fine_grained_activation_offloading:
        apart |= {"expert_fc1", "moe_act"} & set(config.offload_modules or ())
    if apart:
        named = ", ".join(sorted(apart))
        raise ValueError(f"recompute_modules, offload_modules: {named} are parts of Megatron's own MoE layer; use moe")
