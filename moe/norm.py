"""Root-mean-square normalisation, in fp32 or wider whatever comes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the result has the dtype of x."""

    def __init__(self, width: int, eps: float, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend: Backend = backend
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype in and out."""
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return rms_norm(wide, self.weight, self.eps, self.backend).to(x.dtype)
