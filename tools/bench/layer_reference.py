"""What an MoE layer gives, straight from its equations, in fp64: what every contender of `kernels` must meet.

p = softmax(W x),  y = sum over e in top_k(p) of p_e / (sum over top_k(p) of p) * down_e (silu(gate_e x) * up_e x)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_cases import LayerCase, make_layer_weights, make_tokens


class Outcome(NamedTuple):
    """The output of a layer, and the gradients of its input and of its weights."""

    output_TD: Tensor
    input_TD: Tensor
    gate_ED: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor


def reference(case: LayerCase) -> Outcome:
    """What the layer of `case` gives for its tokens and output gradient, fp64."""
    x_TD, grad_TD = (tensor.double() for tensor in make_tokens(case))
    gate_ED, gate_up_E2FD, down_EDF = (weight.double() for weight in make_layer_weights(case))
    leaves = [tensor.requires_grad_() for tensor in (x_TD, gate_ED, gate_up_E2FD, down_EDF)]
    top_TK, experts_TK = F.linear(x_TD, gate_ED).softmax(-1).topk(case.top_k)
    weights_TK = top_TK / top_TK.sum(-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    # unbind, whose backward fills one gradient instead of adding one per expert.
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD.unbind(), down_EDF.unbind(), strict=True)):
        token, choice = (experts_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], gate_up_2FD).chunk(2, -1)
        rows = F.linear(F.silu(gate) * up, down_DF)
        y_TD = y_TD.index_add(0, token, rows * weights_TK[token, choice, None])
    return Outcome(y_TD.detach(), *torch.autograd.grad(y_TD, leaves, grad_TD))


def differences(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Of each tensor the norm of what differs, relative to the norm of what is expected."""
    return {
        name.rpartition("_")[0]: (torch.dist(here.double(), there) / torch.linalg.vector_norm(there)).item()
        for name, here, there in zip(Outcome._fields, found, expected, strict=True)
    }
