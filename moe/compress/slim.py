"""Expert Slimming (METHODS C4; arXiv 2406.02500): weights of experts set to zero, by magnitude, Wanda or SparseGPT.

What an expert's weights are worth is told by the tokens that were routed to it alone. Routers, norms, attention and
everything else keep all of theirs. Pure functions; zeros are stored like other weights, so this saves no memory.

Not here: the compensation of SparseGPT (sparsegpt.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import sparsegpt
from .plan import Pattern, Slim

__all__ = ["kept", "slim", "slim_experts"]


def kept(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """bool: the weights of a row that stay, those of the highest scores [..., inputs].

    Of each row exactly round(sparsity * inputs) go; of n:m exactly n of every m neighbours. Of equal scores the lower
    index goes. Raises ValueError where m does not divide the inputs, or a score is not a number.
    """
    inputs = scores.size(-1)
    n, m = (round(sparsity * inputs), inputs) if pattern == "unstructured" else map(int, pattern.split(":"))
    if inputs % m:
        raise ValueError(f"pattern: {pattern} does not fit rows of {inputs} inputs; use unstructured")
    if scores.isnan().any():
        raise ValueError("a weight, or the sums of its inputs, is not a number; check the checkpoint, or profile again")
    grouped = scores.unflatten(-1, (-1, m))
    gone = grouped.argsort(dim=-1, stable=True)[..., :n]
    return torch.ones_like(grouped, dtype=torch.bool).scatter(-1, gone, False).flatten(-2)


def slim(weight_OI: Tensor, how: Slim, sums: Tensor | None = None) -> Tensor:
    """`weight_OI` with zeros; a stack [e, O, I] with `sums` of each matrix is fine.

    sums: of the inputs' squares [I] for wanda, of x x^T [I, I] for sparsegpt; over tokens, not means and not roots.
    Raises ValueError where they are missing.
    """
    if how.method == "magnitude":
        return _masked(weight_OI, weight_OI.abs().double(), how)
    if sums is None:
        raise ValueError(f"method: {how.method} needs sums of the inputs; profile the checkpoint, or use magnitude")
    if how.method == "wanda":
        return _masked(weight_OI, weight_OI.abs().double() * sums.double().sqrt().unsqueeze(-2), how)
    if weight_OI.dim() == 2:
        return sparsegpt.prune(weight_OI, sums, how)
    return torch.stack([sparsegpt.prune(weight, each, how) for weight, each in zip(weight_OI, sums, strict=True)])


def slim_experts(
    gate_up_e2FD: Tensor, down_eDF: Tensor, how: Slim, statistics: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor, list[int]]:
    """The experts of one layer, slimmed, and those among them that saw too few tokens to be judged by these alone.

    statistics: of the layer's experts, sums over the tokens routed to each: `tokens_e`, for wanda `input_sq_eD` and
        `hidden_sq_eF` (of what `down` reads), for sparsegpt `hessian_in_eDD` and `hessian_hidden_eFF`.
    Deviation: hidden units of different experts have nothing in common, so that what stands in for the sums of a
        starved expert's hidden units is the mean over units and experts, the same for all units.
    Raises ValueError where statistics are missing or of other experts.
    """
    if how.method == "magnitude":
        return slim(gate_up_e2FD, how), slim(down_eDF, how), []
    names = ("input_sq_eD", "hidden_sq_eF") if how.method == "wanda" else ("hessian_in_eDD", "hessian_hidden_eFF")
    tokens_e, inputs, hidden = _statistics(statistics or {}, how, names, len(gate_up_e2FD))
    tokens, total = [int(count) for count in tokens_e.tolist()], int(tokens_e.sum())
    pooled = inputs.sum(0)
    even = _even(hidden.sum(0))
    gate_up, down, starved = torch.empty_like(gate_up_e2FD), torch.empty_like(down_eDF), []
    for expert, count in enumerate(tokens):
        sums, few_inputs = sparsegpt.shrunk(inputs[expert], count, pooled, total, inputs.size(-1))
        hidden_sums, few_hidden = sparsegpt.shrunk(hidden[expert], count, even, total, hidden.size(-1))
        # Where no expert saw a token nothing tells inputs apart.
        gate_up[expert] = slim(gate_up_e2FD[expert], how, sums if total else _even(torch.ones_like(sums)))
        down[expert] = slim(down_eDF[expert], how, hidden_sums if total else _even(torch.ones_like(hidden_sums)))
        if few_inputs or few_hidden:
            starved.append(expert)
    return gate_up, down, starved


def _masked(weight: Tensor, scores: Tensor, how: Slim) -> Tensor:
    return weight.masked_fill(~kept(scores, how.pattern, how.sparsity), 0.0)


def _statistics(
    statistics: Mapping[str, Tensor], how: Slim, names: tuple[str, str], experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    found = []
    for name in ("tokens_e", *names):
        if name not in statistics:
            raise ValueError(f"method: {how.method} needs {name} of the profile, which has none; profile again with it")
        if len(statistics[name]) != experts:
            raise ValueError(f"{name} is of {len(statistics[name])} experts, and this layer has {experts}")
        found.append(statistics[name].double())
    return found[0], found[1], found[2]


def _even(sums: Tensor) -> Tensor:
    """Every unit with the mean of all, none with another in common."""
    if sums.dim() == 1:
        return torch.full_like(sums, sums.mean().item())
    return torch.eye(len(sums), dtype=sums.dtype, device=sums.device) * sums.diagonal().mean()
