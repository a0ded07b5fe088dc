"""Loss of the output layer chunk by chunk: logits of one chunk exist at a time, gradients are formed with them.

The gradient of a sum of token losses does not depend on later layers but for one factor, so forward computes
it at once (as Liger-Kernel's fused linear cross entropy does) and backward scales it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of logits that exist at a time: small enough for a CPU's cache, large enough for full matrix products.
CHUNK_BYTES = 4 * 2**20


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T):
        T, V = hidden_TD.size(0), weight_VD.size(0)
        wide = torch.float32 if hidden_TD.dtype.itemsize < 4 else hidden_TD.dtype
        rows = max(1, CHUNK_BYTES // (V * wide.itemsize))
        grad_hidden = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        loss = hidden_TD.new_zeros((), dtype=torch.float64)
        for start in range(0, T, rows):
            hidden = hidden_TD[start : start + rows]
            target = targets_T[start : start + rows]
            ignored = target < 0
            index = target.clamp(min=0).unsqueeze(-1)
            logits = F.linear(hidden, weight_VD).to(wide)
            picked = logits.gather(-1, index)
            peak = logits.amax(-1, keepdim=True)
            exp = logits.sub_(peak).exp_()
            total = exp.sum(-1, keepdim=True)
            token_loss = (total.log() + peak - picked).squeeze(-1).masked_fill_(ignored, 0)
            loss += token_loss.sum(dtype=torch.float64)
            if grad_hidden is None and grad_weight is None:
                continue
            # softmax - one_hot, zero for ignored tokens
            grad = exp.mul_(total.reciprocal_().masked_fill_(ignored.unsqueeze(-1), 0))
            grad.scatter_add_(-1, index, (ignored.unsqueeze(-1).to(wide) - 1))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight_VD, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += torch.mm(grad.t(), hidden)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        return loss.to(wide)

    @staticmethod
    def backward(ctx, *grads):
        scaled = [None if saved is None else saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors]
        return *scaled, None


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """As `naive.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T)  # pyright: ignore[reportReturnType]
