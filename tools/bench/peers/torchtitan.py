"""torchtitan's MoE layer alone: its whole models attend with flex attention, whose backward a CPU lacks.

Its experts multiply in bf16 whatever they are given, so it contends in bf16 only.
"""

from __future__ import annotations

import importlib.util

import torch

from ..layer_cases import LayerCase, LayerWeights
from ..layer_step import PeerLayer, gradient_of

PIP = "--no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17 docstring_parser==0.18.0"
"""It and all that its MoE layer imports beside torch. What else it depends on would change the versions of other
peers."""
IMPORTS = ("spmd_types", "tyro", "docstring_parser")


def missing() -> str:
    """Why it cannot be built here, or nothing."""
    absent = [name for name in IMPORTS if importlib.util.find_spec(name) is None]
    return f"torchtitan needs {', '.join(absent)}: pip install {PIP}" if absent else ""


def build_layer(case: LayerCase, weights: LayerWeights) -> PeerLayer:
    """The layer of `case`, without the bias that balances its experts."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    E, D, F = weights.down_EDF.shape
    config = MoE.Config(
        num_experts=E,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=case.top_k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=E,
            gate=Linear.Config(in_features=D, out_features=E),
            top_k=case.top_k,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=None,
    )
    layer = config.build().to(case.torch_dtype)
    gate_EFD, up_EFD = weights.gate_up_E2FD.chunk(2, 1)
    layer.load_state_dict(
        {
            "router.gate.weight": weights.gate_ED,
            "routed_experts.inner_experts.w1_EFD": gate_EFD,
            "routed_experts.inner_experts.w3_EFD": up_EFD,
            "routed_experts.inner_experts.w2_EDF": weights.down_EDF,
        }
    )
    experts = layer.routed_experts.inner_experts

    def gradients() -> LayerWeights:
        gate_up_E2FD = torch.cat([gradient_of(experts.w1_EFD), gradient_of(experts.w3_EFD)], 1)
        return LayerWeights(gradient_of(layer.router.gate.weight), gate_up_E2FD, gradient_of(experts.w2_EDF))

    return PeerLayer(layer, lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0), gradients)
