"""A vocabulary whose rows are spread over the tensor ranks: embedding, scores, and the loss without whole logits.

Rows are cut unevenly where they do not divide (`tensor.part_of`), so no weight holds padding and checkpoints know of no
layout. One rank uses `kernels.cross_entropy` instead, whose `naive.py` is the reference of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .collectives import start_gather, start_scatter
from .events import Recorder
from .mesh import Axis, Mesh
from .tensor import Stream, local, part_of

CHUNK_BYTES = 32 * 2**20
"""Of logits that exist at a time on a rank. Larger than on one rank, where nothing waits for a message."""


def look_up(tokens_BS: Tensor, weight_VD: Tensor, mesh: Mesh, stream: Stream) -> Tensor:
    """The embedding of `tokens_BS`, the same on all tensor ranks, as `stream` holds it: [B, n, D]."""
    rows_vD = local(weight_VD)
    index_BS, is_here_BS = own_rows(tokens_BS, part_of(weight_VD.size(0), mesh.tensor))
    return stream.leave(F.embedding(index_BS, rows_vD).masked_fill(~is_here_BS.unsqueeze(-1), 0))


def scores(hidden_BSD: Tensor, weight_VD: Tensor, mesh: Mesh) -> Tensor:
    """Logits [B, S, V] of `hidden_BSD`, the same on all tensor ranks. Not differentiable."""
    size = weight_VD.size(0)
    own_BSv = F.linear(hidden_BSD, local(weight_VD))
    lacking = -(-size // mesh.tensor.size) - own_BSv.size(-1)
    padded_BSv = F.pad(own_BSv, (0, lacking))
    return start_gather(padded_BSv, 2, mesh.tensor, "tensor-scores", mesh.recorder).land()[..., :size]


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_GT: Tensor, mesh: Mesh) -> Tensor:
    """This rank's part of the sum over all tokens of -log softmax(hidden weight^T)[target]; fp32 or wider.

    Differentiable once. A rank's gradients are of the sum of all parts: every rank must scale its part alike.

    Args:
        hidden_TD: of this rank's tokens, as many on every tensor rank, in the dtype of the weight.
        weight_VD: the output layer; each rank holds its rows.
        targets_GT: int64, targets of the tokens of all G tensor ranks; -100 counts nothing.
    """
    needs = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    own, axis = part_of(weight_VD.size(0), mesh.tensor), mesh.tensor
    rows_vD = local(weight_VD).to(hidden_TD.dtype)
    arguments = (hidden_TD, rows_vD, targets_GT, own, -(-weight_VD.size(0) // axis.size), needs, axis, mesh.recorder)
    return _LinearCrossEntropy.apply(*arguments)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, rows_vD, targets_GT, own, most_rows, needs, axis, recorder):
        T = hidden_TD.size(0)
        wide = torch.float32 if hidden_TD.dtype.itemsize < 4 else hidden_TD.dtype
        # The same number of chunks on every rank, however the vocabulary is cut.
        each = max(1, CHUNK_BYTES // (axis.size * most_rows * wide.itemsize))
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs else None
        grad_rows_vD = torch.zeros_like(rows_vD, dtype=wide) if needs else None
        loss = hidden_TD.new_zeros((), dtype=torch.float64)
        for start in range(0, T, each):
            # N tokens: those of all ranks in this chunk.
            hidden_ND = start_gather(hidden_TD[start : start + each], 0, axis, "loss-gather", recorder).land()
            target_N = targets_GT[:, start : start + each].reshape(-1)
            index_N, is_here_N = own_rows(target_N, own)
            logits_Nv = F.linear(hidden_ND, rows_vD).to(wide)
            picked_N = logits_Nv.gather(-1, index_N.unsqueeze(-1)).squeeze(-1).masked_fill_(~is_here_N, 0)
            peak_N = logits_Nv.amax(-1)
            exp_Nv = logits_Nv.sub_(peak_N.unsqueeze(-1)).exp_()
            top_N, total_N, picked_N = _merged(peak_N, exp_Nv.sum(-1), picked_N, axis, recorder)
            is_ignored_N = target_N < 0
            loss_N = (total_N.log() + top_N - picked_N).masked_fill_(is_ignored_N, 0)
            loss += loss_N.view(axis.size, -1)[axis.rank].sum(dtype=torch.float64)
            if grad_hidden_TD is not None and grad_rows_vD is not None:
                # softmax - one_hot, zero for ignored tokens.
                factor_N = ((peak_N - top_N).exp_() / total_N).masked_fill_(is_ignored_N, 0)
                grad_Nv = exp_Nv.mul_(factor_N.unsqueeze(-1))
                grad_Nv.scatter_add_(-1, index_N.unsqueeze(-1), -is_here_N.unsqueeze(-1).to(wide))
                grad_Nv = grad_Nv.to(hidden_ND.dtype)
                sums = start_scatter(torch.mm(grad_Nv, rows_vD), 0, axis, "loss-scatter", recorder)
                grad_rows_vD += torch.mm(grad_Nv.t(), hidden_ND)
                grad_hidden_TD[start : start + each] = sums.land()
        ctx.save_for_backward(grad_hidden_TD, None if grad_rows_vD is None else grad_rows_vD.to(rows_vD.dtype))
        return loss.to(wide)

    @staticmethod
    def backward(ctx, *grads):
        grad_hidden_TD, grad_rows_vD = ctx.saved_tensors
        scale = grads[0]
        scaled = (grad_hidden_TD * scale.to(grad_hidden_TD.dtype), grad_rows_vD * scale.to(grad_rows_vD.dtype))
        return *scaled, None, None, None, None, None, None


def spread_targets(targets_BS: Tensor, mesh: Mesh) -> Tensor:
    """Targets of whole sequences as the G tensor ranks hold their tokens: [G, T]."""
    return targets_BS.unflatten(1, (mesh.tensor.size, -1)).movedim(1, 0).flatten(1)


def own_rows(index: Tensor, own: range) -> tuple[Tensor, Tensor]:
    """Places of `index` among this rank's rows (0 where it is elsewhere), and whether it is here."""
    is_here = (index >= own.start) & (index < own.stop)
    return (index - own.start).masked_fill(~is_here, 0), is_here


def _merged(
    peak_N: Tensor, total_N: Tensor, picked_N: Tensor, axis: Axis, recorder: Recorder
) -> tuple[Tensor, Tensor, Tensor]:
    """Over all ranks: the largest logit, the sum of exponentials below it, the target's logit; one small message."""
    told_13N = torch.stack([peak_N, total_N, picked_N]).unsqueeze(0)
    peak_GN, total_GN, picked_GN = start_gather(told_13N, 0, axis, "loss-sums", recorder).land().unbind(1)
    top_N = peak_GN.amax(0)
    return top_N, (total_GN * (peak_GN - top_N).exp()).sum(0), picked_GN.sum(0)
