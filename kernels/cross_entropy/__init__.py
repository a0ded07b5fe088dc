"""The output layer and its cross-entropy in one, so that logits need not be kept."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, implementation
from . import naive, vectorised

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, backend: Backend = "auto") -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[target], fp32 or wider; targets of -100 count nothing.

    Both inputs share one dtype; `targets_T` is int64. Differentiable once, in both inputs.
    """
    chosen = naive if implementation(backend, hidden_TD.device) == "reference" else vectorised
    return chosen.linear_cross_entropy(hidden_TD, weight_VD, targets_T)
