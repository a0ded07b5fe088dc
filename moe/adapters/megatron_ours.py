"""Our own router, or our MoE layer as a whole, inside Megatron-Core's model: every option of ours, the same numbers.

    Gate      our router before Megatron's dispatcher and experts
    Mixture   our layer in the place of Megatron's

`megatron.py` and `megatron_layer.py` bring Rectify-Router into models that are Megatron's otherwise: its options, its
choices, its balancing losses. Here all of that is ours, which a run needs that is to be the same under both engines:
the queue for slots goes sequence after sequence, jitter and emulated ranks are there, and losses are hung on by who
trains, from the routings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.backend import Backend
from ...parallel.expert import EXPERT_PARAMETERS
from ...parallel.mesh import Mesh
from ..config import RouterConfig
from ..layer import MoELayer
from ..mixture import Mixer
from ..router import TopKRouter
from .megatron import weights_and_map
from .routings import Observer

__all__ = ["Gate", "Mixture"]


class Gate(TopKRouter):
    """Our `TopKRouter` in Megatron's words; the routings that it tells of hold their graph."""

    on_routing: Observer | None = None

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        *,
        router: RouterConfig,
        mesh: Mesh,
        backend: Backend = "auto",
    ) -> None:
        """`config` and `pg_collection` as Megatron gives them to its routers.

        Raises ValueError where its experts or the ranks of `mesh` cannot have these options.
        """
        with torch.device(mesh.device):
            super().__init__(config.hidden_size, config.num_moe_experts, router, backend)
        self.mixer = Mixer(self.num_experts, router, mesh, backend=backend)

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron numbers its layers; nothing here depends on that."""

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Weights and map, [T, E], of tokens [S, B, D]; nothing is padded.

        Tokens are decided on in our order, sequence after sequence: who comes first may get the last slot.
        """
        S, B, _ = input.shape
        routing = self.mixer.rectify(super().forward(input.transpose(0, 1).flatten(0, 1), self.mixer.blocks))
        if self.on_routing is not None:
            self.on_routing(routing)

        def sequence_first(of_tokens_TE: Tensor) -> Tensor:
            return of_tokens_TE.view(B, S, -1).transpose(0, 1).flatten(0, 1)

        weights_TE, map_TE = weights_and_map(routing)
        return sequence_first(weights_TE), sequence_first(map_TE)


class Mixture(nn.Module):
    """Our MoE layer in Megatron's words; the routings that it tells of hold their graph."""

    on_routing: Observer | None = None

    def __init__(self, config: Any, submodules: Any = None, *, layer: MoELayer, make: Callable[[], MoELayer]) -> None:
        """`config` and `submodules` as Megatron gives them to its layers.

        layer: whose memory the weights are in; make: makes one like it.
        """
        super().__init__()
        with torch.device("meta"):
            self.layer = make()
        for name, p in layer.named_parameters():
            owner, _, leaf = name.rpartition(".")
            module = self.layer.get_submodule(owner)
            shared: Any = nn.Parameter(p.detach())
            # Gradients of the others are summed over all ranks, of these over those that hold the same experts.
            shared.allreduce = leaf not in getattr(module, EXPERT_PARAMETERS, ())
            module.register_parameter(leaf, shared)
        self.layer.router.bias_E = layer.router.bias_E

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[S, B, D] -> [S, B, D], and no bias."""
        # Our weights are fp32, and cast where they compute.
        dtype = hidden_states.dtype
        with torch.autocast(hidden_states.device.type, dtype, enabled=dtype == torch.bfloat16):
            y_BSD, routing = self.layer(hidden_states.transpose(0, 1).contiguous())
        if self.on_routing is not None:
            self.on_routing(routing)
        return y_BSD.transpose(0, 1).contiguous(), None
