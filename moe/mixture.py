"""What lies between any gate and any experts: rectify, dispatch, compute, combine.

mixture   tokens, router logits and a function that applies experts -> each token's sum; a use without a module
Mixer     the same, built once: what `layer.MoELayer` and the adapters hold
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..kernels.backend import Backend
from ..parallel.mesh import Mesh, single
from ..parallel.recompute import PLAIN, Calls
from ..parallel.tensor import compute_dtype
from .config import RouterConfig, nearest_divisor
from .dispatcher import Dispatcher
from .router import route
from .routing import Routing

Experts = Callable[[Tensor, Tensor], Tensor]
"""Rows [R, D] sorted by expert and offsets [e] -> rows [R, D]. Rows of this rank's expert i end before row offsets[i]
(int32). Rows of slots that stayed empty are zeros; what becomes of them is not read."""


def mixture(
    x_TD: Tensor,
    logits_TE: Tensor,
    experts: Experts,
    config: RouterConfig,
    mesh: Mesh | None = None,
    *,
    dropless: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Routing]:
    """Each token's weighted sum over its experts [T, D], and the routing; for modules with a gate of their own.

    Differentiable in the tokens, the logits, and whatever `experts` reads. With `config.emulate` the T tokens are
    those of that many ranks, one after the other. With a `mesh` they are this rank's own, `experts` applies the ones
    that this rank holds (`parallel.expert.local_experts`), and every rank of the mesh must make the same call.

    Args:
        x_TD: tokens.
        logits_TE: what the gate says of all E experts; routing computes in fp32 or wider.
        experts: what the experts compute; called a second time where stand-ins are computed during the exchange.
        config: router options and `rectify`; those of the gate itself (`kind`, `jitter`) are its owner's.
        mesh: this rank's place among all; None: a single process.
        dropless: lifts the capacity, for generation.
    Raises:
        ValueError: shapes that do not fit, or options that these experts or tokens cannot have.
    """
    if logits_TE.dim() != 2 or x_TD.dim() != 2 or x_TD.size(0) != logits_TE.size(0):
        shapes = f"x_TD: {list(x_TD.shape)} and logits_TE: {list(logits_TE.shape)}"
        raise ValueError(f"{shapes} are not [T, D] and [T, E] of the same tokens; flatten batch and sequence")
    if config.kind != "learned" or config.jitter:
        name = "jitter" if config.jitter else "kind"
        raise ValueError(f"{name}: {getattr(config, name)} is for our own gate; change the logits of yours instead")
    mixer = Mixer(logits_TE.size(1), config, mesh or single(x_TD.device), backend=backend)
    routing = mixer.route(logits_TE, dropless)
    return mixer(x_TD, routing, experts), routing


class Mixer:
    """Routes by logits, and takes tokens to their experts and back, for one layer of this rank."""

    def __init__(
        self,
        num_experts: int,
        config: RouterConfig,
        mesh: Mesh,
        dispatch: str = "ragged",
        piece_bytes: int = 0,
        backend: Backend = "auto",
        name: str = "",
        calls: Calls = PLAIN,
    ) -> None:
        """`name` goes before the names of the collectives, say `layer3.`; `calls` computes what lies between them.

        Raises ValueError where `num_experts` or the mesh cannot have these options, or `padded` rows of stand-ins
        would have to travel.
        """
        _check(num_experts, config, mesh)
        self.config = config
        self.dispatcher = Dispatcher(num_experts, mesh, dispatch, piece_bytes, backend, name, calls)
        self._calls = calls
        sources = config.emulate.sources if config.emulate else mesh.stage.size
        self.blocks = sources // mesh.stage.size
        self.rectifier = self._make_rectifier(mesh) if config.rectify.is_on else None

    def route(self, logits_TE: Tensor, dropless: bool = False, bias_E: Tensor | None = None) -> Routing:
        """The routing that `logits_TE` ask for, rectified; see `mixture`. `bias_E` steers selection only."""
        blocks = 1 if dropless else self.blocks
        return self.rectify(route(logits_TE, self.config, blocks, dropless, bias_E, self.dispatcher.backend))

    def rectify(self, routing: Routing) -> Routing:
        """`routing` with lost choices served and empty slots filled, as `config.rectify` says."""
        if self.rectifier is None or routing.capacity is None:
            return routing
        return self.rectifier(routing)

    def __call__(
        self,
        x_TD: Tensor,
        routing: Routing,
        experts: Experts,
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Each token's weighted sum over its experts, and what `shared` makes of it; [T, D]."""
        x_TD = self._calls.operator("norm 2", compute_dtype, x_TD)
        dispatcher = self.dispatcher
        travel = self.rectifier is not None and self.rectifier.travels
        handle = dispatcher.plan(routing, x_TD.size(-1) * x_TD.element_size(), travel)
        tokens = dispatcher.start_dispatch(x_TD, handle)
        # While the tokens travel: what needs nothing from other ranks.
        shared_TD = shared(x_TD) if shared is not None else None
        local_LD = None
        if handle.local is not None:
            local_LD = experts(dispatcher.local_rows(x_TD, handle.local), handle.local.offsets_e)
        rows_RD = experts(dispatcher.finish_dispatch(tokens, handle), handle.offsets_e)
        outputs = dispatcher.start_combine(rows_RD, handle)
        y_TD = dispatcher.finish_combine(outputs, handle)
        if handle.local is not None and local_LD is not None:
            y_TD = y_TD + dispatcher.combine_local(local_LD, handle.local)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def _make_rectifier(self, mesh: Mesh):
        # Imported here: a layer that does not rectify does not need it.
        from .rectify import Rectifier, own_experts

        config, dispatcher = self.config, self.dispatcher
        own = own_experts(dispatcher.num_experts, dispatcher.local, self.blocks, mesh.stage.rank, config.emulate)
        travels = config.rectify.intra and not own.within(dispatcher.local, self.blocks)
        if travels and dispatcher.padded:
            raise ValueError(
                "dispatch: padded has no room for stand-ins of other ranks, which router.emulate asks for here; "
                "use dispatch: ragged, or as many owners as parallel.expert"
            )
        return Rectifier(config, own, travels, dispatcher.backend)


def _check(num_experts: int, config: RouterConfig, mesh: Mesh) -> None:
    """Raises ValueError where so many experts, or the ranks of `mesh`, cannot have these options."""
    if config.num_choices > num_experts:
        fill = " with its fill_ranks" if config.num_choices > config.top_k else ""
        raise ValueError(
            f"top_k: {config.top_k}{fill} makes {config.num_choices} choices among {num_experts} experts; "
            f"use {num_experts} choices at most"
        )
    if num_experts % config.groups:
        nearest = nearest_divisor(num_experts, config.groups)
        raise ValueError(f"groups: {config.groups} does not divide {num_experts} experts; use {nearest}")
    per_group = num_experts // config.groups
    if config.top_groups * per_group < config.num_choices:
        enough = -(-config.num_choices // per_group)
        raise ValueError(
            f"top_groups: {config.top_groups} of {config.groups} groups hold {config.top_groups * per_group} experts, "
            f"fewer than {config.num_choices} choices; use {enough}"
        )
    emulate, world = config.emulate, mesh.stage.size
    if emulate is not None and num_experts % emulate.owners:
        nearest = nearest_divisor(num_experts, emulate.owners)
        raise ValueError(f"owners: {emulate.owners} does not divide {num_experts} experts; use {nearest}")
    if emulate is not None and emulate.sources % world:
        nearest = max(1, round(emulate.sources / world)) * world
        raise ValueError(f"sources: {emulate.sources} is not a multiple of {world} ranks; use {nearest}")
