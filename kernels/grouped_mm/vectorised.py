"""The expert feed-forward as grouped matrix products: all experts in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def supported(x_RD: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped_mm takes these: fp32, bf16 or fp16, and strides of whole 16 bytes."""
    if x_RD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(size * w.element_size() % 16 == 0 for w in weights for size in w.shape[1:])


def _grad_weight(grad_RM: Tensor, x_RN: Tensor, offsets_e: Tensor) -> Tensor:
    """Per group the product grad^T x: [e, M, N]."""
    return F.grouped_mm(grad_RM.t(), x_RN, offs=offsets_e)


class _GroupedSwiGLU(torch.autograd.Function):
    """Saves the input and gate/up rows; the product of the two is formed again in backward."""

    @staticmethod
    def forward(ctx, x_RD, gate_up_e2FD, down_eDF, offsets_e):
        gate_up_R2F = F.grouped_mm(x_RD, gate_up_e2FD.transpose(-2, -1), offs=offsets_e)
        gate_RF, up_RF = gate_up_R2F.chunk(2, -1)
        hidden_RF = F.silu(gate_RF).mul_(up_RF)
        ctx.save_for_backward(x_RD, gate_up_R2F, gate_up_e2FD, down_eDF, offsets_e)
        return F.grouped_mm(hidden_RF, down_eDF.transpose(-2, -1), offs=offsets_e)

    @staticmethod
    def backward(ctx, *grads):
        x_RD, gate_up_R2F, gate_up_e2FD, down_eDF, offsets_e = ctx.saved_tensors
        grad_RD = grads[0].contiguous()  # grouped_mm refuses expanded gradients
        gate_RF, up_RF = gate_up_R2F.chunk(2, -1)
        act_RF = F.silu(gate_RF)
        grad_hidden_RF = F.grouped_mm(grad_RD, down_eDF, offs=offsets_e)
        grad_gate_up_R2F = torch.empty_like(gate_up_R2F)
        grad_gate_RF, grad_up_RF = grad_gate_up_R2F.chunk(2, -1)
        torch.mul(grad_hidden_RF, act_RF, out=grad_up_RF)
        torch.ops.aten.silu_backward.grad_input(grad_hidden_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
        grad_down = _grad_weight(grad_RD, act_RF.mul_(up_RF), offsets_e) if ctx.needs_input_grad[2] else None
        grad_gate_up = _grad_weight(grad_gate_up_R2F, x_RD, offsets_e) if ctx.needs_input_grad[1] else None
        grad_x = F.grouped_mm(grad_gate_up_R2F, gate_up_e2FD, offs=offsets_e) if ctx.needs_input_grad[0] else None
        return grad_x, grad_gate_up, grad_down, None


def grouped_swiglu(x_RD: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor) -> Tensor:
    """As `naive.grouped_swiglu`, where `supported`."""
    return _GroupedSwiGLU.apply(x_RD, gate_up_e2FD, down_eDF, offsets_e)  # pyright: ignore[reportReturnType]
