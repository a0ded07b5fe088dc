"""Each token's expert outputs, weighted and summed back into one row per token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, implementation
from . import naive, vectorised

__all__ = ["combine"]


def combine(
    rows_RD: Tensor,
    weights_TK: Tensor,
    position_TK: Tensor,
    source_R: Tensor,
    may_be_empty: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """y_t = sum over k of weights_TK[t, k] * rows_RD[position_TK[t, k]], positions of -1 left out; [T, D].

    `source_R` is the inverse map (token of each row, -1 for padding). Sums run in the weights' dtype, in the
    order of k. `may_be_empty=False` promises that neither map holds a -1. Differentiable in rows and weights.
    """
    # Sums keep the dtype of the weights under autocast too.
    with torch.autocast(rows_RD.device.type, enabled=False):
        return _combine(rows_RD, weights_TK, position_TK, source_R, may_be_empty, backend)


def _combine(
    rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor, may_be_empty: bool, backend: Backend
) -> Tensor:
    found = implementation(backend, rows_RD.device)
    if found == "triton":
        from . import kernel

        return kernel.combine(rows_RD, weights_TK, position_TK, source_R, may_be_empty)
    if found == "reference":
        return naive.combine(rows_RD, weights_TK, position_TK, source_R)
    return vectorised.combine(rows_RD, weights_TK, position_TK, source_R, may_be_empty)
