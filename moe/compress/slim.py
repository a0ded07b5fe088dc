"""Expert Slimming (METHODS C4; arXiv 2406.02500): weights of experts set to zero, by magnitude, Wanda or SparseGPT.

What an expert's weights are worth is told by the tokens that were routed to it alone. Routers, norms, attention and
everything else keep all of theirs. Pure functions; zeros are stored like other weights, so this saves no memory.

Not here: the compensation of SparseGPT (sparsegpt.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import sparsegpt
from .plan import Pattern, Slim

__all__ = ["ExpertSums", "kept", "slim"]


def kept(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """bool: the weights of a row that stay, those of the highest scores [..., inputs].

    Of each row exactly round(sparsity * inputs) go; of n:m exactly n of every m neighbours. Of equal scores the lower
    index goes. Raises ValueError where m does not divide the inputs, or a score is not a number.
    """
    inputs = scores.size(-1)
    sparsegpt.check_pattern(inputs, pattern)
    n, m = (round(sparsity * inputs), inputs) if pattern == "unstructured" else map(int, pattern.split(":"))
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


class ExpertSums:
    """What one layer's experts read, as sums over their tokens; those of starved experts moved towards their layer's.

    Deviation: hidden units of different experts have nothing in common, so that towards which the sums of a starved
    expert's hidden units are moved is the mean over units and experts, the same for all units.
    """

    def __init__(self, tokens_E: Tensor, input_of: Callable[[int], Tensor], hidden_of: Callable[[int], Tensor]) -> None:
        """tokens_E: tokens that each expert got. input_of(e), hidden_of(e): its sums, of squares or of x x^T, of what
        its gate and up read, and of what its down reads."""
        self._tokens = [int(tokens) for tokens in tokens_E.tolist()]
        self._read = {"input": input_of, "hidden": hidden_of}
        self._pools: dict[str, Tensor] = {}

    def __call__(self, expert: int, weight: str) -> Tensor:
        """Sums, fp64, of what `weight` of `expert` reads: `down`, or any other."""
        which = self._which(weight)
        own, tokens = self._read[which](expert).double(), self._tokens[expert]
        if not self._starves(tokens, own):
            return own
        total = sum(self._tokens)
        # Where no expert saw a token nothing tells inputs apart.
        return sparsegpt.shrunk(own, tokens, self._pool(which), total) if total else _even(own, 1.0)

    def is_starved(self, expert: int, weight: str) -> bool:
        """Whether it had too few tokens to be judged by these alone."""
        return self._starves(self._tokens[expert], self._read[self._which(weight)](expert))

    def _which(self, weight: str) -> str:
        return "hidden" if weight == "down" else "input"

    def _starves(self, tokens: int, sums: Tensor) -> bool:
        return tokens < sparsegpt.ENOUGH * sums.size(-1)

    def _pool(self, which: str) -> Tensor:
        if which not in self._pools:
            total = self._read[which](0).double()
            for expert in range(1, len(self._tokens)):
                total = total + self._read[which](expert).double()
            mean = (total if total.dim() == 1 else total.diagonal()).mean().item()
            self._pools[which] = _even(total, mean) if which == "hidden" else total
        return self._pools[which]


def _masked(weight: Tensor, scores: Tensor, how: Slim) -> Tensor:
    return weight.masked_fill(~kept(scores, how.pattern, how.sparsity), 0.0)


def _even(sums: Tensor, value: float) -> Tensor:
    """Like `sums`, with `value` for every unit, none with another in common."""
    if sums.dim() == 1:
        return torch.full_like(sums, value, dtype=torch.float64)
    return torch.eye(len(sums), dtype=torch.float64, device=sums.device) * value
