"""The dense feed-forward network, and the shared experts, which are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel.recompute import Call, plainly
from ..parallel.tensor import ALONE, Stream, local


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with hidden width F."""

    tensor_parameters: ClassVar = {"gate.weight": 0, "up.weight": 0, "down.weight": 1}

    def __init__(self, d_model: int, d_hidden: int, call: Call = plainly) -> None:
        super().__init__()
        self._call = call
        self.gate = nn.Linear(d_model, d_hidden, bias=False)
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor, stream: Stream = ALONE) -> Tensor:
        """Same leading dimensions in and out; `stream` brings the tokens of all tensor ranks."""
        # One row of tokens: side by side without a copy, whatever their order.
        x_TD = x.flatten(0, -2)
        if stream.travels:
            # Hidden units of tokens that came from other ranks: to form them again would bring these again.
            y_TD = self._call(self._leave, *self._enter(x_TD, stream))
        else:
            y_TD = self._call(lambda x_TD: self._leave(*self._enter(x_TD, stream)), x_TD)
        return stream.leave(y_TD).view(x.shape)

    def _enter(self, x_TD: Tensor, stream: Stream) -> Sequence[Tensor]:
        return stream.project(x_TD, local(self.gate.weight), local(self.up.weight))

    def _leave(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        return F.linear(F.silu(gate_TF) * up_TF, local(self.down.weight))
