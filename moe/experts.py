"""The experts of one layer: grouped SwiGLU weights with a leading expert dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.grouped_mm import grouped_swiglu
from ..parallel.recompute import PLAIN, Calls, by_name


class GroupedExperts(nn.Module):
    """e SwiGLU experts of hidden width F over rows grouped by expert."""

    expert_parameters = ("gate_up", "down")

    def __init__(
        self, num_experts: int, d_model: int, d_expert: int, backend: Backend = "auto", calls: Calls = PLAIN
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self._calls = calls
        # In one, where nobody computes parts of it again: it is faster.
        self._parts = None if calls.operator is by_name else calls.operator
        # Gate rows above up rows, [e, 2F, D]; [e, D, F].
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * d_expert, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_expert))

    def forward(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        """Each row through its expert: rows of expert i end before row offsets_e[i] (int32)."""
        return self._calls.hidden(self._compute, rows_RD, offsets_e)

    def _compute(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        dtype = rows_RD.dtype
        weights = self.gate_up.to(dtype), self.down.to(dtype)
        return grouped_swiglu(rows_RD, *weights, offsets_e, self.backend, self._parts)

    def hold(self, use: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
        """`use(x_TD)`, during which the weights are whole: it may call `forward`, on some ranks more often than others.

        Where FSDP2 shares their storage they are gathered once around it. `__call__` would gather them at each call.
        """
        return use(x_TD)
