"""Loss against a teacher chunk by chunk: logits of one chunk exist at a time, gradients are formed with them.

As `cross_entropy.vectorised`, whose chunks and operations these are: what the teacher adds comes on top.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_entropy.vectorised import CHUNK_BYTES


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, teacher_hidden_TD, teacher_weight_VD, targets_T, mix, temperature):
        T, V = hidden_TD.size(0), weight_VD.size(0)
        wide = torch.float32 if hidden_TD.dtype.itemsize < 4 else hidden_TD.dtype
        rows = max(1, CHUNK_BYTES // (V * wide.itemsize))
        grad_hidden = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        nats, divergence = hidden_TD.new_zeros(2, dtype=torch.float64).unbind()
        for start in range(0, T, rows):
            hidden = hidden_TD[start : start + rows]
            target = targets_T[start : start + rows]
            ignored = target < 0
            index = target.clamp(min=0).unsqueeze(-1)
            logits = F.linear(hidden, weight_VD).to(wide)
            taught = F.linear(teacher_hidden_TD[start : start + rows], teacher_weight_VD).to(wide)
            student, teacher = ((x / temperature).log_softmax(-1) for x in (logits, taught))
            probs = teacher.exp()
            token_divergence = (teacher.sub_(student).mul_(probs)).sum(-1).masked_fill_(ignored, 0)
            picked = logits.gather(-1, index)
            peak = logits.amax(-1, keepdim=True)
            exp = logits.sub_(peak).exp_()
            total = exp.sum(-1, keepdim=True)
            token_loss = (total.log() + peak - picked).squeeze(-1).masked_fill_(ignored, 0)
            nats += token_loss.sum(dtype=torch.float64)
            divergence += token_divergence.sum(dtype=torch.float64)
            if grad_hidden is None and grad_weight is None:
                continue
            # softmax - one_hot, zero for ignored tokens
            grad = exp.mul_(total.reciprocal_().masked_fill_(ignored.unsqueeze(-1), 0))
            grad.scatter_add_(-1, index, (ignored.unsqueeze(-1).to(wide) - 1))
            apart = student.exp_().sub_(probs).masked_fill_(ignored.unsqueeze(-1), 0)
            grad = grad.mul_(1 - mix).add_(apart, alpha=mix * temperature).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight_VD, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += torch.mm(grad.t(), hidden)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        nats, divergence = nats.to(wide), divergence.to(wide)
        ctx.mark_non_differentiable(nats, divergence)
        return (1 - mix) * nats + mix * temperature**2 * divergence, nats, divergence

    @staticmethod
    def backward(ctx, *grads):
        scaled = [None if saved is None else saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


def linear_distillation(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TD: Tensor,
    teacher_weight_VD: Tensor,
    targets_T: Tensor,
    mix: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `naive.linear_distillation`."""
    arguments = (hidden_TD, weight_VD, teacher_hidden_TD, teacher_weight_VD, targets_T, mix, temperature)
    return _LinearDistillation.apply(*arguments)  # pyright: ignore[reportReturnType]
