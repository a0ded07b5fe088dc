"""The expert feed-forward as grouped matrix products: all experts in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.vectorised import permute

_FEW = 16
"""Rows: that many are multiplied in the time in which a matrix is read."""
_SMALL = 2**19
"""Elements of a matrix in bf16: a grouped product of such takes longer to start than to compute."""
_PADDING = 1.4
"""Rows with padding over rows that are still worth it then."""
_USED = 0.75
"""Part of the experts that must have rows: one batched product reads the matrices of all."""


def supported(x_RD: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped_mm takes these: fp32, bf16 or fp16, and strides of whole 16 bytes."""
    if x_RD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(size * w.element_size() % 16 == 0 for w in weights for size in w.shape[1:])


def grouped_swiglu(x_RD: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor) -> Tensor:
    """As `naive.grouped_swiglu`, where `supported`."""
    longest = _batched_length(x_RD, gate_up_e2FD, offsets_e)
    if longest is None:
        return _experts(x_RD, gate_up_e2FD, down_eDF, offsets_e)
    source_N, position_R1 = _batches(offsets_e, x_RD.size(0), longest)
    x_eCD = permute(x_RD, source_N, position_R1).view(-1, longest, x_RD.size(1))
    y_ND = _experts(x_eCD, gate_up_e2FD, down_eDF, None).flatten(0, 1)
    return permute(y_ND, position_R1.view(-1), source_N.unsqueeze(1), may_be_empty=False)


def _batched_length(x_RD: Tensor, gate_up_e2FD: Tensor, offsets_e: Tensor) -> int | None:
    """Rows of the longest group, where one batched product of groups padded to it is faster than a grouped one.

    So it is on CPUs for few rows and for small matrices in bf16, by what `wastenot bench kernels` measures. None
    elsewhere, and in a graph that is compiled, which must not read lengths.
    """
    if x_RD.device.type != "cpu" or torch.compiler.is_compiling() or type(offsets_e) is not Tensor:
        return None
    ends = offsets_e.tolist()
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    longest, experts = max(sizes, default=0), len(sizes)
    if longest == 0 or experts - sizes.count(0) < _USED * experts:
        return None
    small = gate_up_e2FD[0].numel() <= _SMALL
    pays = {
        torch.float32: longest <= _FEW,
        torch.bfloat16: small and (longest <= _FEW or longest * experts <= _PADDING * ends[-1]),
    }
    return longest if pays.get(x_RD.dtype) else None


def _batches(offsets_e: Tensor, num_rows: int, longest: int) -> tuple[Tensor, Tensor]:
    """Row of each place among e groups of `longest`, -1 where there is none, and place of each row [R, 1]; int64."""
    ends_e = offsets_e.long()
    row_R = torch.arange(num_rows)
    group_R = torch.searchsorted(ends_e, row_R, right=True)
    starts_e = torch.cat([ends_e.new_zeros(1), ends_e[:-1]])
    position_R = row_R - starts_e[group_R] + group_R * longest
    source_N = torch.full((ends_e.numel() * longest,), -1).scatter_(0, position_R, row_R)
    return source_N, position_R.unsqueeze(1)


def _experts(x: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor | None) -> Tensor:
    gate_up = _Product.apply(x, gate_up_e2FD, offsets_e)
    return _SwiGLUDown.apply(gate_up, down_eDF, offsets_e)  # pyright: ignore[reportReturnType]


def _times(rows: Tensor, w_eNM: Tensor, offsets_e: Tensor | None) -> Tensor:
    """Rows [R, N] in groups that end at `offsets_e`, or [e, C, N], times their own matrix."""
    return torch.bmm(rows, w_eNM) if offsets_e is None else F.grouped_mm(rows, w_eNM, offs=offsets_e)


def _grad_weight(grad: Tensor, rows: Tensor, offsets_e: Tensor | None) -> Tensor:
    """Per group the product grad^T rows: [e, M, N]."""
    if offsets_e is None:
        return torch.bmm(grad.transpose(1, 2), rows)
    return F.grouped_mm(grad.t(), rows, offs=offsets_e)


class _Product(torch.autograd.Function):
    """Rows times their own expert's matrix, transposed."""

    @staticmethod
    def forward(ctx, x, w_eMN, offsets_e):
        ctx.save_for_backward(x, w_eMN, offsets_e)
        return _times(x, w_eMN.transpose(1, 2), offsets_e)

    @staticmethod
    def backward(ctx, *grads):
        x, w_eMN, offsets_e = ctx.saved_tensors
        grad_w = _grad_weight(grads[0], x, offsets_e) if ctx.needs_input_grad[1] else None
        grad_x = _times(grads[0], w_eMN, offsets_e) if ctx.needs_input_grad[0] else None
        return grad_x, grad_w, None


class _SwiGLUDown(torch.autograd.Function):
    """silu(gate) * up, and its product with the down matrices.

    Saves gate, up and silu(gate), which are freed before the gradient of the gate and up matrices is made: that is
    why their product is a function of its own.
    """

    @staticmethod
    def forward(ctx, gate_up, down_eDF, offsets_e):
        gate, up = gate_up.chunk(2, -1)
        act = F.silu(gate)
        ctx.save_for_backward(gate_up, act, down_eDF, offsets_e)
        return _times(act * up, down_eDF.transpose(1, 2), offsets_e)

    @staticmethod
    def backward(ctx, *grads):
        gate_up, act, down_eDF, offsets_e = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad = grads[0].contiguous()  # grouped_mm refuses expanded gradients
        grad_hidden = _times(grad, down_eDF, offsets_e)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        torch.mul(grad_hidden, act, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
        hidden = torch.mul(act, up, out=grad_hidden)
        grad_down = _grad_weight(grad, hidden, offsets_e) if ctx.needs_input_grad[1] else None
        return grad_gate_up, grad_down, None
