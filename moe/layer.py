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
    ) -> None:
        super().__init__()
        self.router = make_router(d_model, moe.experts, router, backend)
        self.experts = GroupedExperts(moe.experts, d_model, moe.d_expert, backend)
        self.shared = SwiGLU(d_model, moe.d_expert * moe.shared_experts) if moe.shared_experts else None
        self.dispatcher = Dispatcher(moe.experts, mesh, moe.dispatch, piece_bytes, backend)
        self.emulated_sources = router.emulate.sources if router.emulate else mesh.world.size
        self.world_size = mesh.world.size

    def forward(self, x_BSD: Tensor, dropless: bool = False) -> tuple[Tensor, Routing]:
        """Returns the layer's output, shaped like `x_BSD`, and the routing it used.

        `dropless` lifts any capacity, for generation.
        """
        x_TD = x_BSD.flatten(0, -2)
        routing = self.router(x_TD, 1 if dropless else self.emulated_sources // self.world_size, dropless)
        x_TD = self._compute_dtype(x_TD)
        handle = self.dispatcher.plan(routing, x_TD.size(-1) * x_TD.element_size())
        tokens = self.dispatcher.start_dispatch(x_TD, handle)
        shared_TD = self.shared(x_TD) if self.shared is not None else None  # while the tokens travel
        rows_RD = self.experts(self.dispatcher.finish_dispatch(tokens, handle), handle.offsets_e)
        outputs = self.dispatcher.start_combine(rows_RD, handle)
        y_TD = self.dispatcher.finish_combine(outputs, routing.weights_TK, handle)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BSD), routing

    @staticmethod
    def _compute_dtype(x_TD: Tensor) -> Tensor:
        """Under autocast rows travel and multiply in its dtype, as nn.Linear's inputs would."""
        device = x_TD.device.type
        return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
