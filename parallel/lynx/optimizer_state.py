"""Bytes that an optimizer keeps of each weight, by the formulas of the optimizers that wastenot trains with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .nearest import refuse_other_than
from .weights import Weight

OptimizerName = Literal["adamw", "adafactor", "adamw8bit", "adapprox", "apollo", "came", "muon"]
Momentum = Literal["fp32", "bf16", "int8", "none"]

_MOMENTUM_BLOCK = 128
"""Numbers of a row that share a scale in Adapprox's 8-bit momentum (METHODS A7)."""
_CODE_BLOCK, _FEWEST_CODES = 256, 4096
"""Numbers that share a scale in torchao's 8-bit AdamW; parameters of fewer than the second keep fp32."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Which optimizer, and what of its settings changes its size."""

    name: OptimizerName = "adamw"
    master: bool = True
    """Keeps a copy of the weights in fp32, where those are in 16 bits."""
    momentum: Momentum = "fp32"
    """Of Adapprox's first moment."""
    rank: float = 0.25
    """Adapprox: mean rank of the factors, as a part of a matrix's smaller side: 0.25 at most by default, and as little
    as 1 / that side. APOLLO: rank of the projection, likewise."""

    def __post_init__(self) -> None:
        refuse_other_than(self.name, get_args(OptimizerName), "optimizer.name")
        refuse_other_than(self.momentum, get_args(Momentum), "optimizer.momentum")
        if not 0 < self.rank <= 1:
            raise ValueError(f"optimizer.rank: {self.rank} is outside (0, 1]; use {1.0 if self.rank > 1 else 0.25}")
        if self.momentum != "fp32" and self.name != "adapprox":
            raise ValueError(f"optimizer.momentum: {self.momentum} has no effect with name: {self.name}; use fp32")


def state_bytes(optimizer: Optimizer, weight: Weight, cut_rows: int = 1, cut_columns: int = 1) -> float:
    """Of one rank's part of all copies of `weight`, without a master copy. Counters are left out.

    Where rows or columns are cut, factors of that side are cut too, and each rank holds the other side's (METHODS A6).
    """
    full = (weight.rows, weight.columns)
    m, n = weight.rows / cut_rows, weight.columns / cut_columns
    is_matrix, numel, name = weight.columns > 1, m * n, optimizer.name
    # Muon and APOLLO take matrices, but no stacks of them and no embeddings: those are AdamW's.
    is_hidden = is_matrix and weight.role == "hidden"
    if name == "adapprox" and is_matrix and sum(full) * _rank(optimizer, full) < full[0] * full[1]:
        one = 4 * _rank(optimizer, full) * (m + n) + _momentum(optimizer, m, n)
    elif name == "adapprox":
        one = 4 * numel + _momentum(optimizer, 1, numel)
    elif name == "adafactor":
        one = 4 * (m + n) if is_matrix else 4 * numel
    elif name == "came" and is_matrix:
        one = 4 * (numel + 2 * (m + n))
    elif name == "muon" and is_hidden:
        one = 4 * numel
    elif name == "apollo" and is_hidden:
        one = 8 * _rank(optimizer, full) * max(m, n)
    elif name == "adamw8bit" and weight.numel >= _FEWEST_CODES:
        one = 2 * numel * (1 + 4 / _CODE_BLOCK)
    else:
        one = 8 * numel
    return weight.copies * one


def _rank(optimizer: Optimizer, size: tuple[int, int]) -> int:
    """Of the whole matrix, whatever a rank holds of it."""
    return max(1, int(optimizer.rank * min(size)))


def _momentum(optimizer: Optimizer, m: float, n: float) -> float:
    scales = m * math.ceil(n / _MOMENTUM_BLOCK)
    return {"fp32": 4 * m * n, "bf16": 2 * m * n, "int8": m * n + 4 * scales, "none": 0.0}[optimizer.momentum]
