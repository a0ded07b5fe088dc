"""Combine weights as a router's configuration wants them (METHODS R4, R6)."""

from __future__ import annotations

from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.weigh import weigh
from .config import RouterConfig


def combine_weights(
    logits_TE: Tensor, experts_TK: Tensor, slots_TK: Tensor | None, config: RouterConfig, backend: Backend = "auto"
) -> Tensor:
    """The weight of each choice, 0 where it has no slot (R4); [T, K] with gradient to the logits. None: all have one.

    `normalize: survivors` divides by the sum over choices that got a slot, `top_k` adds the router's own lost ones.
    For K = 1 the result is exactly 1 with the gradient of p.
    """
    always_counted = config.top_k if config.normalize == "top_k" else 0
    times_TK = None if slots_TK is None else (slots_TK >= 0).long()
    return _weigh(logits_TE, experts_TK, times_TK, always_counted, config, backend)


def weights_with_stand_in(
    logits_TE: Tensor, experts_TL: Tensor, times_TL: Tensor, config: RouterConfig, backend: Backend = "auto"
) -> Tensor:
    """Weights [T, K + 1] of the choices and, last, of a stand-in for those that were lost (R6).

    times_TL: 1 for choices that have a slot, 0 for lost ones, and how many routes the stand-in serves. Every route is
    taken again, so `normalize: survivors` and `top_k` divide by the same sum.
    """
    return _weigh(logits_TE, experts_TL, times_TL, 0, config, backend)


def _weigh(
    logits_TE: Tensor,
    experts_TK: Tensor,
    times_TK: Tensor | None,
    always_counted: int,
    config: RouterConfig,
    backend: Backend,
) -> Tensor:
    weights_TK = weigh(
        logits_TE,
        experts_TK,
        times_TK,
        config.score,
        normalize=config.normalize != "none",
        detach=config.detach,
        always_counted=always_counted,
        backend=backend,
    )
    return weights_TK if config.scale == 1 else weights_TK * config.scale
