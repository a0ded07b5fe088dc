"""The expert feed-forward as grouped matrix products: all experts in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.vectorised import permute

_FEW = {torch.float32: 16, torch.bfloat16: 64}
"""Rows of the longest group, up to which one batched product is faster than one by one on CPUs."""
_USED = 0.75
"""Part of the experts that must have rows: one batched product reads the matrices of all."""
_ROUND = 32
"""Rows: in bf16, groups are padded to whole multiples, so that products of few shapes serve all routings."""


Call = Callable[..., Any]
"""call(name, function, *args) -> function(*args): one of the three parts, for whoever computes parts again."""


def supported(x_RD: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped_mm takes these: fp32, bf16 or fp16, and strides of whole 16 bytes."""
    if x_RD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(size * w.element_size() % 16 == 0 for w in weights for size in w.shape[1:])


def grouped_swiglu(
    x_RD: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor, call: Call | None = None
) -> Tensor:
    """As `naive.grouped_swiglu`, where `supported`."""
    sizes = _sizes(x_RD, offsets_e)
    longest = _batched_length(sizes, x_RD.dtype)
    if longest is not None:
        lengths_e, ends_e = torch.full_like(offsets_e, longest, dtype=torch.int64), None
    elif sizes and x_RD.dtype is torch.bfloat16:
        lengths_e = torch.tensor([-(-size // _ROUND) * _ROUND for size in sizes])
        ends_e = lengths_e.cumsum(0, dtype=offsets_e.dtype)
    else:
        return _experts(x_RD, gate_up_e2FD, down_eDF, offsets_e, call)
    places = _Places(longest, *_maps(offsets_e, lengths_e, x_RD.size(0)))
    return _experts(x_RD, gate_up_e2FD, down_eDF, ends_e, call, places)


def _sizes(x_RD: Tensor, offsets_e: Tensor) -> list[int]:
    """Rows of each group; none on a GPU and in a graph that is compiled, where lengths must not be read."""
    if x_RD.device.type != "cpu" or torch.compiler.is_compiling() or type(offsets_e) is not Tensor:
        return []
    ends = offsets_e.tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _batched_length(sizes: list[int], dtype: torch.dtype) -> int | None:
    """Rows of the longest group, where one batched product of groups padded to it is faster than a grouped one.

    Measured: a matrix is read in the time in which a few rows are multiplied, and a product takes time to start.
    """
    longest, used = max(sizes, default=0), len(sizes) - sizes.count(0)
    return longest if 0 < longest <= _FEW.get(dtype, 0) and used >= _USED * len(sizes) else None


@dataclass(frozen=True)
class _Places:
    """Where rows lie once groups are padded."""

    longest: int | None
    """Rows of every group; None: they have lengths of their own."""
    source_N: Tensor
    """int64: row of each place, -1 where there is none."""
    position_R1: Tensor
    """int64: place of each row."""

    def spread(self, x_RD: Tensor, source_N: Tensor, position_R1: Tensor) -> Tensor:
        """Rows at their places, zeros elsewhere."""
        x_ND = permute(x_RD, source_N, position_R1)
        return x_ND if self.longest is None else x_ND.view(-1, self.longest, x_RD.size(1))

    def gather(self, y: Tensor, source_N: Tensor, position_R1: Tensor) -> Tensor:
        """Rows from their places."""
        return permute(y.flatten(0, -2), position_R1.view(-1), source_N.unsqueeze(1), may_be_empty=False)


def _maps(offsets_e: Tensor, lengths_e: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Of `_Places`, once group e has `lengths_e` rows (int64), zeros at its end."""
    ends_e = offsets_e.long()
    row_R = torch.arange(num_rows)
    group_R = torch.searchsorted(ends_e, row_R, right=True)
    shift_e = (lengths_e.cumsum(0) - lengths_e) - (ends_e - ends_e.diff(prepend=ends_e.new_zeros(1)))
    position_R = row_R + shift_e[group_R]
    source_N = torch.full((int(lengths_e.sum()),), -1).scatter_(0, position_R, row_R)
    return source_N, position_R.unsqueeze(1)


def _experts(
    x_RD: Tensor,
    gate_up_e2FD: Tensor,
    down_eDF: Tensor,
    ends_e: Tensor | None,
    call: Call | None,
    places: _Places | None = None,
) -> Tensor:
    """Groups end at `ends_e`, or all have one length, as `places` says."""
    maps = () if places is None else (places.source_N, places.position_R1)

    def up(x_RD: Tensor, weight: Tensor, ends_e: Tensor | None, *maps: Tensor) -> Any:
        return _Product.apply(places.spread(x_RD, *maps) if places else x_RD, weight, ends_e)

    if call is None:
        y: Any = _SwiGLUDown.apply(up(x_RD, gate_up_e2FD, ends_e, *maps), down_eDF, ends_e)
        return places.gather(y, *maps) if places else y

    def down(hidden: Tensor, weight: Tensor, ends_e: Tensor | None, *maps: Tensor) -> Any:
        y: Any = _Product.apply(hidden, weight, ends_e)
        return places.gather(y, *maps) if places else y

    gate_up = call("expert up", up, x_RD, gate_up_e2FD, ends_e, *maps)
    return call("expert down", down, call("expert activation", _SwiGLU.apply, gate_up), down_eDF, ends_e, *maps)


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
        grad = grads[0].contiguous()  # grouped_mm refuses expanded gradients
        grad_w = _grad_weight(grad, x, offsets_e) if ctx.needs_input_grad[1] else None
        grad_x = _times(grad, w_eMN, offsets_e) if ctx.needs_input_grad[0] else None
        return grad_x, grad_w, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, of which backward forms the first again: of the input alone."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, *grads):
        (gate_up,) = ctx.saved_tensors
        # A copy, for it is overwritten: it may be somebody else's as well.
        return _grad_gate_up(grads[0].clone(), gate_up, F.silu(gate_up.chunk(2, -1)[0]))


def _grad_gate_up(grad_hidden: Tensor, gate_up: Tensor, act: Tensor) -> Tensor:
    """Gradient of gate and up, from that of silu(gate) * up, which it overwrites."""
    gate, up = gate_up.chunk(2, -1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, -1)
    torch.mul(grad_hidden, act, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
    return grad_gate_up


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
        grad = grads[0].contiguous()  # grouped_mm refuses expanded gradients
        grad_hidden = _times(grad, down_eDF, offsets_e)
        grad_gate_up = _grad_gate_up(grad_hidden, gate_up, act)
        hidden = torch.mul(act, gate_up.chunk(2, -1)[1], out=grad_hidden)
        grad_down = _grad_weight(grad, hidden, offsets_e) if ctx.needs_input_grad[1] else None
        return grad_gate_up, grad_down, None
