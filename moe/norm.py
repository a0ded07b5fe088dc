"""Root-mean-square normalisation, in fp32 or wider whatever comes in.

RMSNorm      of vectors that a rank holds whole
CutRMSNorm   of vectors that tensor ranks share
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.norm import rms_norm
from ..parallel.collectives import sum_over
from ..parallel.mesh import Mesh
from ..parallel.tensor import local


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


class CutRMSNorm(nn.Module):
    """RMSNorm of vectors of `width` numbers, of which each tensor rank holds and gets its part."""

    tensor_parameters: ClassVar = {"weight": 0}

    def __init__(self, width: int, eps: float, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(torch.empty(width))
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype in and out."""
        weight, mesh = local(self.weight), self.mesh
        wide = x.to(torch.promote_types(x.dtype, weight.dtype))
        squares = sum_over(wide.square().sum(-1, keepdim=True), mesh.tensor, "tensor-norm", mesh.recorder)
        return (wide * torch.rsqrt(squares / self.width + self.eps) * weight).to(x.dtype)
