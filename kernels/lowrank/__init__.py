"""Adam's second moment held as a low-rank product, and what a step needs of it, without forming it whole.

V = beta2 * max(Q U^T, 0) + (1 - beta2) * G^2        (METHODS A2; arXiv 2403.14958, algorithm 3)

Suffixes: b matrices, m rows, n columns, k rank, c columns of a product, r rows of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..backend import Backend, implementation
from .naive import second_moment
from .step import Step
from .vectorised import SecondMoment, Tile

if TYPE_CHECKING:
    from .kernel import FusedMoment

__all__ = ["SecondMoment", "Step", "Tile", "fused_moment", "second_moment"]


def fused_moment(
    q_bmk: Tensor,
    u_bnk: Tensor,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    momenta: Sequence[Mapping[str, Tensor]],
    beta2: float,
    eps: float,
    backend: Backend = "auto",
) -> FusedMoment | None:
    """The second moment as Triton kernels that step weights in the same passes; see `kernel.FusedMoment.of`.

    None where `backend` or the device has no Triton, and for what the kernels do not take.
    """
    if implementation(backend, q_bmk.device) != "triton":
        return None
    from .kernel import FusedMoment

    return FusedMoment.of(q_bmk, u_bnk, grads, weights, momenta, beta2, eps)
