"""The MoE layer: a gate, experts, and the mixer between them."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ..kernels.backend import Backend
from ..parallel.mesh import Mesh
from ..parallel.recompute import PLAIN, Calls
from ..parallel.tensor import ALONE, Stream
from .config import MoEConfig, RouterConfig
from .dispatcher import Dispatcher
from .experts import GroupedExperts
from .feedforward import SwiGLU
from .mixture import Mixer
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
        calls: Calls = PLAIN,
    ) -> None:
        """`layer` counts MoE layers from 0; `calls` computes its operators.

        Raises ValueError where `padded` rows of stand-ins would have to travel.
        """
        super().__init__()
        self.router = make_router(d_model, moe.experts, router, backend, layer)
        self.experts = GroupedExperts(moe.experts, d_model, moe.d_expert, backend, calls)
        shared = moe.d_expert * moe.shared_experts
        self.shared = SwiGLU(d_model, shared, calls, "shared") if shared else None
        self.mixer = Mixer(moe.experts, router, mesh, moe.dispatch, piece_bytes, backend, f"layer{layer}.", calls)
        self._calls = calls
        self._is_gathered = mesh.expert_shard.size > 1

    @property
    def dispatcher(self) -> Dispatcher:
        """Where the layer's experts are."""
        return self.mixer.dispatcher

    def forward(self, x_BSD: Tensor, dropless: bool = False, stream: Stream = ALONE) -> tuple[Tensor, Routing]:
        """Returns the layer's output, shaped like `x_BSD`, and the routing it used.

        `dropless` lifts any capacity, for generation. The shared experts are a dense layer, which reads `stream`.
        """
        x_TD = x_BSD.flatten(0, -2)
        routing = self._calls.operator("router", self._route, x_TD, dropless)
        shared = None if self.shared is None else partial(self.shared, stream=stream)
        # Gathered weights are there for the whole of `hold`; a call with hooks would gather and free them each time.
        experts = self.experts.forward if self._is_gathered else self.experts
        y_TD = self.experts.hold(lambda x_TD: self.mixer(x_TD, routing, experts, shared), x_TD)
        return y_TD.view_as(x_BSD), routing

    def _route(self, x_TD: Tensor, dropless: bool) -> Routing:
        """Never computed again: the forward's decision stands."""
        return self.mixer.rectify(self.router(x_TD, 1 if dropless else self.mixer.blocks, dropless))
