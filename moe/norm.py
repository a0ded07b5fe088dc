"""Root-mean-square normalisation, in fp32 or wider whatever comes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the result has the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype in and out."""
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return F.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)
