"""The MoE layer: route, dispatch, experts, combine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..parallel.mesh import Mesh
from .config import MoEConfig, RouterConfig
from .dispatcher import Dispatcher
from .experts import GroupedExperts
from .feedforward import SwiGLU
from .router import make_router
from .routing import Routing


class MoELayer(nn.Module):
    """Replaces a feed-forward network by E experts of which each token uses a few, plus shared ones.

    Built with all E experts (on `meta` for large models); `parallel.apply.parallelize` keeps this rank's share.
    """

    def __init__(
        self,
        d_model: int,
        moe: MoEConfig,
        router: RouterConfig,
        mesh: Mesh,
        piece_bytes: int = 0,
        backend: Backend = "auto",
        layer: int = 0,
    ) -> None:
        """`layer` counts MoE layers from 0. Raises ValueError where `padded` rows of stand-ins would have to travel."""
        super().__init__()
        self.router = make_router(d_model, moe.experts, router, backend, layer)
        self.experts = GroupedExperts(moe.experts, d_model, moe.d_expert, backend)
        self.shared = SwiGLU(d_model, moe.d_expert * moe.shared_experts) if moe.shared_experts else None
        self.dispatcher = Dispatcher(moe.experts, mesh, moe.dispatch, piece_bytes, backend, f"layer{layer}.")
        sources = router.emulate.sources if router.emulate else mesh.world.size
        self.blocks = sources // mesh.world.size
        self.rectifier = self._make_rectifier(router, mesh) if router.rectify.is_on else None

    def forward(self, x_BSD: Tensor, dropless: bool = False) -> tuple[Tensor, Routing]:
        """Returns the layer's output, shaped like `x_BSD`, and the routing it used.

        `dropless` lifts any capacity, for generation.
        """
        x_TD = x_BSD.flatten(0, -2)
        routing = self.router(x_TD, 1 if dropless else self.blocks, dropless)
        if self.rectifier is not None and not dropless:
            routing = self.rectifier(routing)
        x_TD = self._compute_dtype(x_TD)
        y_TD = self._mixture(x_TD, routing)
        return y_TD.view_as(x_BSD), routing

    def _mixture(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Each token's weighted sum over its experts, and the shared ones; [T, D]."""
        dispatcher = self.dispatcher
        travel = self.rectifier is not None and self.rectifier.travels
        handle = dispatcher.plan(routing, x_TD.size(-1) * x_TD.element_size(), travel)
        tokens = dispatcher.start_dispatch(x_TD, handle)
        # While the tokens travel: what needs nothing from other ranks.
        shared_TD = self.shared(x_TD) if self.shared is not None else None
        local_LD = None
        if handle.local is not None:
            local_LD = self.experts(dispatcher.local_rows(x_TD, handle.local), handle.local.offsets_e)
        rows_RD = self.experts(dispatcher.finish_dispatch(tokens, handle), handle.offsets_e)
        outputs = dispatcher.start_combine(rows_RD, handle)
        y_TD = dispatcher.finish_combine(outputs, handle)
        if handle.local is not None and local_LD is not None:
            y_TD = y_TD + dispatcher.combine_local(local_LD, handle.local)
        return y_TD if shared_TD is None else y_TD + shared_TD

    @staticmethod
    def _compute_dtype(x_TD: Tensor) -> Tensor:
        """Under autocast rows travel and multiply in its dtype, as nn.Linear's inputs would."""
        device = x_TD.device.type
        return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD

    def _make_rectifier(self, config: RouterConfig, mesh: Mesh):
        # Imported here: a layer that does not rectify does not need it.
        from .rectify import Rectifier, own_experts

        dispatcher = self.dispatcher
        own = own_experts(dispatcher.num_experts, dispatcher.local, self.blocks, mesh.world.rank, config.emulate)
        travels = config.rectify.intra and not own.within(dispatcher.local, self.blocks)
        if travels and dispatcher.padded:
            raise ValueError(
                "dispatch: padded has no room for stand-ins of other ranks, which router.emulate asks for here; "
                "use dispatch: ragged, or as many owners as parallel.expert"
            )
        return Rectifier(config, own, travels, dispatcher.backend)
