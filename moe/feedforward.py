"""The dense feed-forward network, and the shared experts, which are one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel.recompute import PLAIN, Calls
from ..parallel.tensor import ALONE, Stream, compute_dtype, local


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with hidden width F."""

    tensor_parameters: ClassVar = {"gate.weight": 0, "up.weight": 0, "down.weight": 1}

    def __init__(self, d_model: int, d_hidden: int, calls: Calls = PLAIN, part: str = "feed-forward") -> None:
        """`part`: of its layer; names of its operators begin with it, unless it is all there is."""
        super().__init__()
        self._calls, self.part = calls, part
        self._prefix = "" if part == "feed-forward" else f"{part} "
        self.gate = nn.Linear(d_model, d_hidden, bias=False)
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor, stream: Stream = ALONE) -> Tensor:
        """Same leading dimensions in and out; `stream` brings the tokens of all tensor ranks."""
        # One row of tokens: side by side without a copy, whatever their order.
        x_TD = x.flatten(0, -2)
        if stream.travels:
            # Hidden units of tokens that came from other ranks: to form them again would bring these again.
            y_TD = self._calls.hidden(self._leave, *self._enter(x_TD, stream))
        else:
            y_TD = self._calls.hidden(lambda x_TD: self._leave(*self._enter(x_TD, stream)), x_TD)
        return stream.leave(y_TD, self.part, self._calls.windows).view(x.shape)

    def _enter(self, x_TD: Tensor, stream: Stream) -> Sequence[Tensor]:
        weights = [compute_dtype(local(each.weight)) for each in (self.gate, self.up)]
        project = partial(stream.project, part=self.part, windows=self._calls.windows)
        return self._calls.operator(f"{self._prefix}up", project, x_TD, *weights)

    def _leave(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        call, down = self._calls.operator, compute_dtype(local(self.down.weight))
        hidden_TF = call(f"{self._prefix}activation", lambda gate, up: F.silu(gate) * up, gate_TF, up_TF)
        return call(f"{self._prefix}down", F.linear, hidden_TF, down)
