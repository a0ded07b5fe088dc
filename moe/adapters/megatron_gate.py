"""Our own router as the router of Megatron-Core's MoE layer: every option of `RouterConfig`, and the same choices.

`megatron.RectifyRouter` adds to Megatron's choices; this one makes them. It has what Megatron's lacks or does
otherwise, and a run needs that is to be the same under both engines: the queue for slots goes sequence by sequence,
jitter and emulated ranks are ours, and balancing losses are hung on by who trains, from the routings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.backend import Backend
from ...parallel.mesh import Mesh
from ..config import RouterConfig
from ..mixture import Mixer
from ..router import TopKRouter
from .megatron import weights_and_map
from .routings import Observer

__all__ = ["Gate"]


class Gate(TopKRouter):
    """Our `TopKRouter` in Megatron's words; its routings hold their graph."""

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
