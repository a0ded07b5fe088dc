"""The floor of the `kernels` benchmark: the experts' matrix products alone, on rows that are already in order."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_cases import LayerCase, make_choices, make_layer_weights
from .layer_step import Pass


class Floor:
    """Two grouped products forward, four backward, each of all experts in one call; no gate, no activation."""

    def __init__(self, case: LayerCase) -> None:
        _, self.gate_up_E2FD, self.down_EDF = make_layer_weights(case)
        rows_E = torch.bincount(make_choices(case).flatten(), minlength=case.experts)
        self.offsets_E = rows_E.cumsum(0).to(torch.int32)
        generator = torch.Generator().manual_seed(case.seed)
        R = case.tokens * case.top_k

        def rows(width: int) -> Tensor:
            return torch.randn(R, width, generator=generator).to(case.torch_dtype)

        self.x_RD, self.hidden_RF, self.grad_RD = rows(case.d_model), rows(case.d_expert), rows(case.d_model)
        self.grad_gate_up_R2F = rows(2 * case.d_expert)

    def run(self, what: Pass) -> float:
        """Does the products of `what` once and returns their seconds."""
        start = time.perf_counter()
        made = self._forward()
        if what == "both":
            made += self._backward()
        # Results live until here, as a layer's do.
        took = time.perf_counter() - start
        del made
        return took

    def _forward(self) -> list[Tensor]:
        return [
            self._product(self.x_RD, self.gate_up_E2FD.transpose(1, 2)),
            self._product(self.hidden_RF, self.down_EDF.transpose(1, 2)),
        ]

    def _backward(self) -> list[Tensor]:
        return [
            self._product(self.grad_RD, self.down_EDF),
            self._product(self.grad_RD.t(), self.hidden_RF),
            self._product(self.grad_gate_up_R2F.t(), self.x_RD),
            self._product(self.grad_gate_up_R2F, self.gate_up_E2FD),
        ]

    def _product(self, rows: Tensor, other: Tensor) -> Tensor:
        return F.grouped_mm(rows, other, offs=self.offsets_E)
