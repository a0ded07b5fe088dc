"""The loss against a teacher where the rows of both vocabularies are spread over the tensor ranks.

As `vocabulary.linear_cross_entropy`; `kernels.distillation.naive` is the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import vocabulary
from .collectives import start_gather, start_scatter
from .mesh import Mesh
from .tensor import local, part_of
from .vocabulary import own_rows


def linear_distillation(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    taught_TD: Tensor,
    taught_weight_VD: Tensor,
    targets_GT: Tensor,
    mix: float,
    temperature: float,
    mesh: Mesh,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's parts of what `kernels.distillation.linear_distillation` gives; fp32 or wider.

    The first is differentiable once. A rank's gradients are of the sum of all parts: every rank must scale its part
    alike. Of the divergence a rank's part is that of its rows, over the tokens of all ranks.

    Args:
        hidden_TD, taught_TD: of this rank's tokens, as many on every tensor rank, in the dtype of the weights.
        weight_VD, taught_weight_VD: the output layers, of one vocabulary; each rank holds its rows.
        targets_GT: int64, targets of the tokens of all G tensor ranks; -100 counts nothing.
    """
    own, axis = part_of(weight_VD.size(0), mesh.tensor), mesh.tensor
    rows_vD, taught_vD = (local(weight).to(hidden_TD.dtype) for weight in (weight_VD, taught_weight_VD))
    most_rows = -(-weight_VD.size(0) // axis.size)
    arguments = (hidden_TD, rows_vD, taught_TD, taught_vD, targets_GT, mix, temperature)
    return _LinearDistillation.apply(*arguments, own, most_rows, axis, mesh.recorder)  # pyright: ignore[reportReturnType]


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_TD, rows_vD, taught_TD, taught_vD, targets_GT, mix, temperature, own, most_rows, axis, recorder
    ):
        T = hidden_TD.size(0)
        wide = torch.float32 if hidden_TD.dtype.itemsize < 4 else hidden_TD.dtype
        # The same number of chunks on every rank, however the vocabulary is cut.
        each = max(1, vocabulary.CHUNK_BYTES // (axis.size * most_rows * wide.itemsize))
        grad_hidden_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_rows_vD = torch.zeros_like(rows_vD, dtype=wide) if ctx.needs_input_grad[1] else None
        nats, divergence = hidden_TD.new_zeros(2, dtype=torch.float64).unbind()
        for start in range(0, T, each):
            # N tokens: those of all ranks in this chunk.
            here = slice(start, start + each)
            hidden_ND = start_gather(hidden_TD[here], 0, axis, "loss-gather", recorder).land()
            taught_ND = start_gather(taught_TD[here], 0, axis, "teacher-gather", recorder).land()
            target_N = targets_GT[:, here].reshape(-1)
            is_ignored_N = target_N < 0
            index_N, is_here_N = own_rows(target_N, own)
            logits_Nv = F.linear(hidden_ND, rows_vD).to(wide)
            taught_Nv = F.linear(taught_ND, taught_vD).to(wide).div_(temperature)
            soft_Nv = logits_Nv / temperature
            picked_N = logits_Nv.gather(-1, index_N.unsqueeze(-1)).squeeze(-1).masked_fill_(~is_here_N, 0)
            parts = [_peak_and_total(x_Nv) for x_Nv in (logits_Nv, soft_Nv, taught_Nv)]
            told_17N = torch.stack([each_N for part in parts for each_N in part] + [picked_N]).unsqueeze(0)
            told_7GN = start_gather(told_17N, 0, axis, "loss-sums", recorder).land().unbind(1)
            logs_N = [_log_total(*told_7GN[2 * i : 2 * i + 2]) for i in range(3)]
            loss_N = (logs_N[0] - told_7GN[6].sum(0)).masked_fill_(is_ignored_N, 0)
            nats += loss_N.view(axis.size, -1)[axis.rank].sum(dtype=torch.float64)
            soft_Nv -= logs_N[1].unsqueeze(-1)
            taught_Nv -= logs_N[2].unsqueeze(-1)
            probs_Nv = taught_Nv.exp()
            apart_N = taught_Nv.sub_(soft_Nv).mul_(probs_Nv).sum(-1).masked_fill_(is_ignored_N, 0)
            divergence += apart_N.sum(dtype=torch.float64)
            if grad_hidden_TD is None and grad_rows_vD is None:
                continue
            # softmax - one_hot, and the students' softmax - the teacher's; zero for ignored tokens.
            grad_Nv = logits_Nv.sub_(logs_N[0].unsqueeze(-1)).exp_()
            grad_Nv.scatter_add_(-1, index_N.unsqueeze(-1), -is_here_N.unsqueeze(-1).to(wide))
            grad_Nv.mul_(1 - mix).add_(soft_Nv.exp_().sub_(probs_Nv), alpha=mix * temperature)
            grad_Nv = grad_Nv.masked_fill_(is_ignored_N.unsqueeze(-1), 0).to(hidden_ND.dtype)
            if grad_hidden_TD is not None:
                sums = start_scatter(torch.mm(grad_Nv, rows_vD), 0, axis, "loss-scatter", recorder)
                grad_hidden_TD[here] = sums.land()
            if grad_rows_vD is not None:
                grad_rows_vD += torch.mm(grad_Nv.t(), hidden_ND)
        ctx.save_for_backward(grad_hidden_TD, None if grad_rows_vD is None else grad_rows_vD.to(rows_vD.dtype))
        nats, divergence = nats.to(wide), divergence.to(wide)
        ctx.mark_non_differentiable(nats, divergence)
        return (1 - mix) * nats + mix * temperature**2 * divergence, nats, divergence

    @staticmethod
    def backward(ctx, *grads):
        scaled = [None if saved is None else saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors]
        return *scaled, *[None] * 9


def _peak_and_total(logits_Nv: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of this rank's logits, and the sum of exponentials below it."""
    peak_N = logits_Nv.amax(-1)
    return peak_N, (logits_Nv - peak_N.unsqueeze(-1)).exp_().sum(-1)


def _log_total(peak_GN: Tensor, total_GN: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials of all ranks' logits."""
    top_N = peak_GN.amax(0)
    return (total_GN * (peak_GN - top_N).exp()).sum(0).log() + top_N
