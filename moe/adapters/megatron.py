"""Rectify-Router as the router of Megatron-Core's own MoE layer, dispatchers and experts (0.16).

    spec = rectify_spec(get_gpt_layer_local_spec(num_experts=8), RectifyConfig(intra=True, fill=True))
    model = GPTModel(config, spec, ...)  # with moe_expert_capacity_factor in config

A router of Megatron's answers with weights and a map from tokens to experts, and these can say all that
rectification does: a filled slot is one more entry, a stand-in an entry at an expert of the token's own rank, whose
row stays there. Slots are counted per source rank (METHODS R2): Megatron's capacity factor and drop policy are taken
over, its own dropping does not run. Balancing and z-losses and the counts for the expert bias are Megatron's, of all
choices before any is dropped.

As in Megatron, capacity holds in evaluation too; but passes of one token per sequence, generation, drop nothing, unless
experts are padded to their capacity: these have no row beyond it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.route import scores, select
from ...parallel.expert import local_experts
from ...parallel.mesh import Axis
from ..config import RectifyConfig
from ..rectify import Rectifier, own_experts
from ..router import place, probabilities
from ..routing import Routing
from .megatron_config import Normalize, router_config
from .routings import Observer, routings_of

try:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import get_pg_rank, get_pg_size
except ImportError as error:
    raise ImportError("wastenot.moe.adapters.megatron needs Megatron-Core; pip install 'wastenot[megatron]'") from error

__all__ = ["RectifyRouter", "rectify_spec", "router_config", "routings_of"]


def rectify_spec(spec: Any, rectify: RectifyConfig, *, normalize: Normalize | None = None) -> Any:
    """`spec` with `RectifyRouter` as the router of every MoE layer in it; the one given stays as it is.

    spec: of a transformer block, layer or MoE layer: a ModuleSpec, or the dataclass of submodules inside one.
    normalize: what weights are divided by (`RouterConfig.normalize`); None: the sum of those that serve the token
    where Megatron divides at all, so that nothing changes while nothing is dropped.

    Raises ValueError where `spec` has no MoE layer, or one whose router is not Megatron's TopKRouter.
    """
    router = ModuleSpec(module=RectifyRouter, params={"rectify": rectify, "normalize": normalize})

    def with_router(node: Any) -> Any:
        if not isinstance(node, MoESubmodules):
            return node
        before = getattr(node.router, "module", node.router)
        if before not in (TopKRouter, RectifyRouter):
            raise ValueError(f"spec: has {before} as a router already; rectify_spec replaces Megatron's TopKRouter")
        return replace(node, router=router)

    return replaced(spec, with_router)


def replaced(spec: Any, change: Callable[[Any], Any]) -> Any:
    """`spec` with what `change` makes of each node below it; nodes that it returns as they are, it looks into.

    Raises ValueError where nothing changed: a specification without MoE layers.
    """
    changed = _walk(spec, change)
    if changed is spec:
        raise ValueError(
            "spec: has no MoE layer; make one with num_experts, say get_gpt_layer_local_spec(num_experts=8)"
        )
    return changed


class RectifyRouter(TopKRouter):
    """Megatron's TopKRouter whose choices are placed, filled and rectified by us; it has the same state."""

    on_routing: Observer | None = None

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        rectify: RectifyConfig,
        normalize: Normalize | None = None,
    ) -> None:
        """Raises ValueError where `config` has no capacity factor, or options that leave no room for `rectify`."""
        self.check(config, rectify)
        # What runs before our part must not drop. The dispatcher reads the real config, and then counts its rows.
        dropless = copy.copy(config)
        dropless.moe_expert_capacity_factor = None
        super().__init__(dropless, pg_collection)
        self.routing_config = router_config(config, rectify, normalize)
        axis = Axis("expert", get_pg_size(pg_collection.ep), get_pg_rank(pg_collection.ep))
        num_experts = self.weight.size(0)
        own = own_experts(num_experts, local_experts(num_experts, axis), blocks=1, rank=0, emulate=None)
        self.rectifier = Rectifier(self.routing_config, own)

    @staticmethod
    def check(config: TransformerConfig, rectify: RectifyConfig) -> None:
        """Raises ValueError where Megatron would not do what our routing says."""
        _check(config, rectify)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Any, Tensor]:
        """Weights and map, [T, E], of logits [S, B, E]."""
        stock_TE, chosen_TE = super().routing(logits, padding_mask)
        generates = logits.size(0) == 1 and not self.training
        # The dispatcher would cut a dropless map to padded experts' capacity by index, whatever the weights say.
        if generates and not self.config.moe_pad_expert_input_to_capacity:
            return stock_TE, chosen_TE
        routing = self.decide(logits.flatten(0, 1), chosen_TE)
        if self.on_routing is not None:
            self.on_routing(routing)
        weights_TE, map_TE = weights_and_map(routing)
        # Megatron hung its losses on its own weights: these stay in the graph, with a zero gradient.
        return weights_TE.type_as(stock_TE) + 0 * stock_TE, map_TE

    def decide(self, logits_TE: Tensor, chosen_TE: Tensor, dropless: bool = False) -> Routing:
        """The rectified routing of the top_k experts per token that Megatron chose, a mask; in fp32 or wider.

        `dropless` lifts any capacity: nothing is left to rectify.
        """
        config = self.routing_config
        logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        scores_TE = scores(logits_TE, config.score)
        probs_TE = probabilities(scores_TE, config.score)
        order_TE = scores_TE.detach()
        if self.expert_bias is not None:
            order_TE = order_TE + self.expert_bias
        barred = torch.finfo(order_TE.dtype).min
        best_TK = select(order_TE.masked_fill(~chosen_TE, barred), config.top_k)
        if config.rectify.fill:
            next_TJ = select(order_TE.masked_fill(chosen_TE, barred), config.rectify.fill_ranks)
            best_TK = torch.cat([best_TK, next_TJ], 1)
        routing = place(best_TK, logits_TE, probs_TE, config, dropless=dropless)
        return routing if routing.capacity is None else self.rectifier(routing)


def weights_and_map(routing: Routing) -> tuple[Tensor, Tensor]:
    """A routing in Megatron's words: weights [T, E], 0 where a token does not go, and where it goes (bool)."""
    has_slot_TK = routing.slots_TK >= 0
    # Lost and spare choices weigh 0; no token has an expert twice, but a stand-in may be one that it had lost.
    weights_TE = torch.zeros_like(routing.probs_TE).scatter(1, routing.experts_TK, routing.weights_TK)
    map_TE = torch.zeros_like(weights_TE, dtype=torch.bool).scatter(1, routing.experts_TK, has_slot_TK)
    stand_ins = routing.stand_ins
    if stand_ins is not None:
        expert_T1 = stand_ins.expert_T.clamp(min=0).unsqueeze(1)
        weights_TE = weights_TE.scatter_add(1, expert_T1, stand_ins.weight_T.unsqueeze(1))
        map_TE = map_TE | torch.zeros_like(map_TE).scatter(1, expert_T1, (stand_ins.slots_T >= 0).unsqueeze(1))
    return weights_TE, map_TE


def check_choices(config: TransformerConfig, rectify: RectifyConfig) -> None:
    """Raises ValueError where `config` leaves no room for `rectify`, whoever dispatches."""
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise ValueError("moe_router_load_balancing_type: sinkhorn makes choices that ours does not know; use aux_loss")
    if config.moe_router_num_groups and rectify.fill:
        raise ValueError("moe_router_num_groups: fill would leave the chosen groups; use fill=False")
    choices, experts = config.moe_router_topk + rectify.fill * rectify.fill_ranks, config.num_moe_experts or 0
    if choices > experts:
        raise ValueError(f"fill_ranks: {choices} choices among {experts} experts; use {experts} choices at most")


def _check(config: TransformerConfig, rectify: RectifyConfig) -> None:
    if config.moe_expert_capacity_factor is None:
        raise ValueError(
            "moe_expert_capacity_factor: None drops nothing and pads nothing; set one, for example 1.0, or leave "
            "Megatron's own router in place"
        )
    if config.moe_token_dispatcher_type == "flex":
        raise ValueError(
            "moe_token_dispatcher_type: flex sends moe_router_topk rows per token and would lose others; use alltoall"
        )
    if config.moe_pad_expert_input_to_capacity and rectify.intra:
        raise ValueError(
            "moe_pad_expert_input_to_capacity: padded experts have no rows beyond their capacity, which intra adds; "
            "use False, or intra=False"
        )
    check_choices(config, rectify)


def _walk(node: Any, change: Callable[[Any], Any]) -> Any:
    """`node` with the changed ones below it; `node` itself where there is none."""
    changed = change(node)
    if changed is not node:
        return changed
    if isinstance(node, list | tuple):
        children = [_walk(child, change) for child in node]
        return node if all(new is old for new, old in zip(children, node, strict=True)) else type(node)(children)
    if not is_dataclass(node) or isinstance(node, type):
        return node
    before = {field.name: getattr(node, field.name) for field in fields(node)}
    changes = {name: new for name, old in before.items() if (new := _walk(old, change)) is not old}
    return replace(node, **changes) if changes else node
