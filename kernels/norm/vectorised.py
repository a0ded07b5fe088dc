"""Root-mean-square normalisation in few passes over memory: on a CPU that is what it costs."""

from __future__ import annotations

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        # The norm is one fused pass; square-then-mean would write a temporary as large as x.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    def backward(ctx, *grads):
        x, weight_D, scale = ctx.saved_tensors
        D = x.size(-1)
        grad = grads[0]
        product_TD = (grad * x).view(-1, D)
        scale_T = scale.view(-1)
        # sum_d g w x serves as both the projection below and, over tokens, the weight's gradient.
        grad_weight = product_TD.t().mv(scale_T)
        along = (product_TD.mv(weight_D) * scale_T.square()).div_(-D).view_as(scale)
        grad_x = (grad * weight_D).addcmul_(x, along).mul_(scale)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `naive.rms_norm`."""
    return _RMSNorm.apply(x.contiguous(), weight_D, eps)  # pyright: ignore[reportReturnType]
