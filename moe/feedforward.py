"""The dense feed-forward network, and the shared experts, which are one."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel.tensor import ALONE, Stream, local


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with hidden width F."""

    tensor_parameters: ClassVar = {"gate.weight": 0, "up.weight": 0, "down.weight": 1}

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden, bias=False)
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor, stream: Stream = ALONE) -> Tensor:
        """Same leading dimensions in and out; `stream` brings the tokens of all tensor ranks."""
        # One row of tokens: side by side without a copy, whatever their order.
        gate_TF, up_TF = stream.project(x.flatten(0, -2), local(self.gate.weight), local(self.up.weight))
        return stream.leave(F.linear(F.silu(gate_TF) * up_TF, local(self.down.weight))).view(x.shape)
