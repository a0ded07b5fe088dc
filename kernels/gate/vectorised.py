"""The gate's logits by units that multiply bf16 and add in fp32, where tokens are bf16 already.

A number of fp32 is the sum of three of bf16, each what the ones before it leave, rounded: 3 x 8 bits hold its 24. The
product with all three, side by side in one matrix, is that of fp32 but for the rounding of sums, and tokens are read
as they are. The gradient of the weight takes the logits' gradient in three parts in the same way; that of the tokens,
itself rounded to bf16, leaves out products of two parts that are 2^-16 of the largest and less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HIGH, MIDDLE, LOW = range(3)


def supported(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Whether this file is for these dtypes. Not fp16: its exponents have no room for what three parts leave."""
    return x_TD.dtype == torch.bfloat16 and weight_ED.dtype in (torch.bfloat16, torch.float32)


def split(wide_RC: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """Parts in bf16 of an fp32 matrix, those that `order` names side by side along `dim`."""
    rest_RC, parts = wide_RC, []
    for _ in range(max(order) + 1):
        parts.append(rest_RC.bfloat16())
        rest_RC = rest_RC - parts[-1]
    return torch.cat([parts[part] for part in order], dim)


Split = Callable[[Tensor, Sequence[int], int], Tensor]


def product(x_TD: Tensor, weight_ED: Tensor, blocks: int, split: Split = split) -> Tensor:
    """As `naive.gate`, fp32, without a gradient."""
    E, parts_ND = weight_ED.size(0), weight_ED
    if weight_ED.dtype == torch.float32:
        parts_ND = split(weight_ED, (LOW, MIDDLE, HIGH), 0)
    if blocks == 1:
        logits_TN = _multiply(x_TD, parts_ND.t())
    else:
        logits_TN = torch.cat([_multiply(block, parts_ND.t()) for block in x_TD.chunk(blocks)])
    return logits_TN if parts_ND is weight_ED else logits_TN.view(-1, 3, E).sum(1)


def differentiate(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, split: Split = split) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the weight, each in its dtype."""
    E, D = weight_ED.shape
    if weight_ED.dtype == torch.float32:
        grads_TN = split(grad_TE, (LOW, MIDDLE, HIGH, HIGH), 1)
        parts_ND = split(weight_ED, (HIGH, HIGH, MIDDLE), 0)
    else:
        grads_TN = split(grad_TE, (LOW, MIDDLE, HIGH), 1)
        parts_ND = torch.cat([weight_ED, weight_ED])
    # A product in bf16 may round partial sums, too: seen on an H100 where E and D were odd.
    grad_TD = _multiply(grads_TN[:, E:], parts_ND).to(x_TD.dtype)
    grad_ED = _multiply(grads_TN[:, : 3 * E].t(), x_TD).view(3, E, D).sum(0)
    return grad_TD, grad_ED.to(weight_ED.dtype)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Product in fp32 of matrices in bf16."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    # For tests: only CUDA has that product.
    return left.float() @ right.float()


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor, blocks: int) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return product(x_TD, weight_ED, blocks)

    @staticmethod
    def backward(ctx, *grads):
        return *differentiate(grads[0], *ctx.saved_tensors), None


def gate(x_TD: Tensor, weight_ED: Tensor, blocks: int) -> Tensor:
    """As `naive.gate`, for `supported` dtypes."""
    return _Gate.apply(x_TD, weight_ED, blocks)  # pyright: ignore[reportReturnType]
