"""The sweep of SparseGPT (arXiv 2301.00774, algorithm 1): weights settle column by column, those left make up for it.

For y = W x and the sums H = sum x x^T, what settling column i changes in y is made good, as far as it can be, by the
columns after it. What a column settles to is a rule's business: zeros here, few bits in quantize.py (GPTQ, arXiv
2210.17323, is the same sweep). Pure functions, the same bits from the same sums.

Not here: masks without compensation (slim.py).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .plan import Pattern, Slim

__all__ = ["Rule", "check_pattern", "prune", "shrunk", "sweep"]

BLOCK = 128
DAMPING = 0.01
"""Of the mean of H's diagonal, added to all of it."""
ENOUGH = 1.0
"""Tokens an expert needs for each of its inputs; with fewer its H has no full rank. A guess."""


class Rule(Protocol):
    """What columns become. Holds what it decides for several columns at once; made anew for each weight."""

    def settle(self, block_OB: Tensor, importance_B: Tensor, column: int) -> Tensor:
        """What `column` of the block becomes, [O]. Called for each in order, with the columns as they are now.

        importance_B: a change d of a weight of that column costs d^2 times this, once those after it made up for it.
        """
        ...


def sweep(weight_OI: Tensor, hessian_II: Tensor, rule: Rule, block: int = BLOCK, damping: float = DAMPING) -> Tensor:
    """`weight_OI` with every column settled by `rule`; in its dtype, computed in fp64.

    hessian_II: sums of x x^T of the inputs. Of no input at all, all columns count the same.
    Raises ValueError where it holds what is no number.
    """
    weight = weight_OI.double().clone()
    upper = _inverse_factor(hessian_II.double(), damping)
    for start in range(0, weight.size(1), block):
        inside = slice(start, min(start + block, weight.size(1)))
        block_OB, upper_BB = weight[:, inside], upper[inside, inside]
        diagonal = upper_BB.diagonal()
        errors = torch.zeros_like(block_OB)
        for column in range(block_OB.size(1)):
            settled = rule.settle(block_OB, diagonal.square().reciprocal(), column)
            errors[:, column] = (block_OB[:, column] - settled) / diagonal[column]
            block_OB[:, column + 1 :] -= errors[:, column : column + 1] * upper_BB[column, column + 1 :]
            block_OB[:, column] = settled
        weight[:, inside.stop :] -= errors @ upper[inside, inside.stop :]
    return weight.to(weight_OI.dtype)


def prune(weight_OI: Tensor, hessian_II: Tensor, how: Slim, block: int = BLOCK, damping: float = DAMPING) -> Tensor:
    """`weight_OI` with zeros as `how` says, the other weights changed to make up for them.

    Unstructured: in each block of columns the same share of weights goes, the cheapest over all its rows; of n:m, the
    cheapest n of each m. Of equally cheap ones those that come first, row by row.
    Raises ValueError where m does not divide the inputs, or a weight or sum is not a number.
    """
    check_pattern(weight_OI.size(-1), how.pattern)
    if not weight_OI.isfinite().all():
        raise ValueError("a weight is not a number; check the checkpoint")
    return sweep(weight_OI, hessian_II, _Pruning(how), block, damping)


def check_pattern(inputs: int, pattern: Pattern) -> None:
    """Raises ValueError where rows of so many inputs do not fall into the m neighbours of n:m."""
    if pattern != "unstructured" and inputs % int(pattern.split(":")[1]):
        raise ValueError(f"pattern: {pattern} does not fit rows of {inputs} inputs; use unstructured")


def shrunk(sums: Tensor, tokens: int, pool: Tensor, pool_tokens: int) -> Tensor:
    """Sums over the N `tokens` of a starved expert, moved towards those of its layer.

    The means become (N H + tau P) / (N + tau), H the expert's and P the layer's, tau as many tokens as there are
    inputs (a guess), and sums again: over N + tau tokens. Of x x^T or of x^2 alike.
    """
    return sums + pool * (sums.size(-1) / pool_tokens)


class _Pruning:
    def __init__(self, how: Slim) -> None:
        self.how = how
        self.gone = torch.empty(0)

    def settle(self, block_OB: Tensor, importance_B: Tensor, column: int) -> Tensor:
        if self.how.pattern == "unstructured":
            if column == 0:
                self.gone = self._cheapest(block_OB, importance_B)
            gone = self.gone[:, column]
        else:
            n, m = map(int, self.how.pattern.split(":"))
            if column % m == 0:
                ahead = slice(column, column + m)
                costs = block_OB[:, ahead].square() * importance_B[ahead]
                first = costs.argsort(dim=-1, stable=True)[:, :n]
                self.gone = torch.zeros_like(costs, dtype=torch.bool).scatter(-1, first, True)
            gone = self.gone[:, column % m]
        return block_OB[:, column].masked_fill(gone, 0.0)

    def _cheapest(self, block_OB: Tensor, importance_B: Tensor) -> Tensor:
        costs = (block_OB.square() * importance_B).flatten()
        count = round(self.how.sparsity * costs.numel())
        gone = torch.zeros_like(costs, dtype=torch.bool)
        gone[costs.argsort(stable=True)[:count]] = True
        return gone.view_as(block_OB)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper U with U^T U = (H + damping)^-1."""
    mean = hessian.diagonal().mean().item()
    if not math.isfinite(mean) or not hessian.isfinite().all():
        raise ValueError("the sums of inputs hold what is no number; profile again")
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    if mean == 0:
        return eye
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + damping * mean * eye))
    return torch.linalg.cholesky(inverse, upper=True)
