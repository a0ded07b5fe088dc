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


class _Product(torch.autograd.Function):
    """Rows times their own expert's matrix, transposed."""

    @staticmethod
    def forward(ctx, x_RN, w_eMN, offsets_e):
        ctx.save_for_backward(x_RN, w_eMN, offsets_e)
        return F.grouped_mm(x_RN, w_eMN.transpose(-2, -1), offs=offsets_e)

    @staticmethod
    def backward(ctx, *grads):
        x_RN, w_eMN, offsets_e = ctx.saved_tensors
        grad_w = _grad_weight(grads[0], x_RN, offsets_e) if ctx.needs_input_grad[1] else None
        grad_x = F.grouped_mm(grads[0], w_eMN, offs=offsets_e) if ctx.needs_input_grad[0] else None
        return grad_x, grad_w, None


class _SwiGLUDown(torch.autograd.Function):
    """silu(gate) * up, and its product with the down matrices.

    Saves gate, up and silu(gate), each by itself: halves of wider rows are slow to read. They are freed before the
    gradient of the gate and up matrices is made, which is why that product is a function of its own.
    """

    @staticmethod
    def forward(ctx, gate_up_R2F, down_eDF, offsets_e):
        gate_RF, up_RF = (half.contiguous() for half in gate_up_R2F.chunk(2, -1))
        act_RF = F.silu(gate_RF)
        ctx.save_for_backward(gate_RF, up_RF, act_RF, down_eDF, offsets_e)
        return F.grouped_mm(act_RF * up_RF, down_eDF.transpose(-2, -1), offs=offsets_e)

    @staticmethod
    def backward(ctx, *grads):
        gate_RF, up_RF, act_RF, down_eDF, offsets_e = ctx.saved_tensors
        grad_RD = grads[0].contiguous()  # grouped_mm refuses expanded gradients
        grad_hidden_RF = F.grouped_mm(grad_RD, down_eDF, offs=offsets_e)
        grad_gate_up_R2F = grad_RD.new_empty(grad_RD.size(0), 2 * gate_RF.size(1))
        grad_gate_RF, grad_up_RF = grad_gate_up_R2F.chunk(2, -1)
        torch.mul(grad_hidden_RF, act_RF, out=grad_up_RF)
        torch.ops.aten.silu_backward.grad_input(grad_hidden_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
        hidden_RF = torch.mul(act_RF, up_RF, out=grad_hidden_RF)
        grad_down = _grad_weight(grad_RD, hidden_RF, offsets_e) if ctx.needs_input_grad[1] else None
        return grad_gate_up_R2F, grad_down, None


def grouped_swiglu(x_RD: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor) -> Tensor:
    """As `naive.grouped_swiglu`, where `supported`."""
    gate_up_R2F = _Product.apply(x_RD, gate_up_e2FD, offsets_e)
    return _SwiGLUDown.apply(gate_up_R2F, down_eDF, offsets_e)  # pyright: ignore[reportReturnType]
