"""Tokens into rows in the order experts want them, and rows into another order."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, implementation
from . import naive, vectorised

__all__ = ["permute", "reorder"]


def permute(
    x_TD: Tensor, source_R: Tensor, position_TK: Tensor, may_be_empty: bool = True, backend: Backend = "auto"
) -> Tensor:
    """Row r is token source_R[r], or zero where that is -1; returns [R, D].

    `position_TK` is the inverse map: the row of choice k of token t, or -1 where it was dropped.
    `may_be_empty=False` promises that no source is -1. Differentiable in `x_TD`.
    """
    found = implementation(backend, x_TD.device)
    if found == "triton":
        from . import kernel

        return kernel.permute(x_TD, source_R, position_TK, may_be_empty)
    if found == "reference":
        return naive.permute(x_TD, source_R, position_TK)
    return vectorised.permute(x_TD, source_R, position_TK, may_be_empty)


def reorder(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor, backend: Backend = "auto") -> Tensor:
    """Row r of the result is row order_R[r], a permutation with inverse `inverse_R`. Differentiable."""
    found = implementation(backend, rows_RD.device)
    if found == "triton":
        from . import kernel

        return kernel.reorder(rows_RD, order_R, inverse_R)
    return (naive if found == "reference" else vectorised).reorder(rows_RD, order_R, inverse_R)
