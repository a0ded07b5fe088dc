"""Root-mean-square normalisation over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Backend, implementation
from ..fused import fused_rms_norm
from . import naive, vectorised

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, backend: Backend = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, shaped like x; both of one dtype. Differentiable in both.

    Off the CPU apex's or torch's fused kernel is used.
    """
    if implementation(backend, x.device) == "reference":
        return naive.rms_norm(x, weight_D, eps)
    if x.device.type != "cpu":
        if torch.compiler.is_compiling():
            return F.rms_norm(x, weight_D.shape, weight_D, eps)
        return fused_rms_norm(x.device).run(x, weight_D, eps)
    return vectorised.rms_norm(x, weight_D, eps)
