"""Weights in few bits (METHODS C4): codes and scales, rounded to the nearest or, with sums of inputs, by GPTQ.

Symmetric: weight = code * scale, so that zero stays zero and no zero point is stored. On disk a weight `w` is two plain
tensors: `w.scale` in bf16 and `w.q`, for 8 bits int8 with a scale for each row of inputs, for 4 bits uint8 with two
codes in a byte, each 8 more than it is, the even input's in the low half, and a scale for each group of inputs. With 4
bits the scale has a sign, so that the largest weight of a group can be the code -8, the one without an opposite.

Not here: computing with them (quantized.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Quantize
from .sparsegpt import BLOCK, sweep

__all__ = ["check_groups", "codes_of", "dequantize", "gptq", "nearest", "pack"]

# The largest weight of a group lies this many steps from zero, whichever loses least. Few more are worth nothing:
# of normal weights in groups of 32 the first, 8, loses 8.6 % (norm of error by norm), these 8.1 %, twice as many 8.1 %.
_STEPS = (8.0, 7.0, 7.29, 7.57, 7.86, 8.14, 8.43, 8.71, 9.0)


def nearest(weight: Tensor, how: Quantize) -> tuple[Tensor, Tensor]:
    """`q` and `scale` of `weight` [..., O, I], each weight the nearest that has a code.

    Raises ValueError where groups do not divide the inputs, or a weight is not a number.
    """
    _check(weight, how)
    grouped = weight.float().unflatten(-1, (-1, _group(weight.size(-1), how)))
    scale = _scale(grouped, how.bits)
    return pack(_codes(grouped, scale, how.bits).flatten(-2).to(torch.int8), how.bits), scale.squeeze(-1)


def gptq(weight_OI: Tensor, hessian_II: Tensor, how: Quantize) -> tuple[Tensor, Tensor]:
    """As `nearest`, each column rounded in turn, those after it changed to make up for it (arXiv 2210.17323).

    hessian_II: sums of x x^T over the inputs. Raises ValueError where `nearest` does, or a sum is not a number.
    """
    _check(weight_OI, how)
    rule = _Rounding(weight_OI, how)
    settled = sweep(weight_OI.double(), hessian_II, rule, block=max(BLOCK, rule.group if how.bits == 4 else 0))
    scale = torch.stack(rule.scales, -1)
    grouped = settled.unflatten(-1, (-1, rule.group))
    return pack(_codes(grouped, scale.unsqueeze(-1), how.bits).flatten(-2).to(torch.int8), how.bits), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """The weights, fp32, [..., O, I]."""
    return (codes_of(q).unflatten(-1, (scale.size(-1), -1)) * scale.float().unsqueeze(-1)).flatten(-2)


def codes_of(q: Tensor) -> Tensor:
    """The codes of `q` as they count, int8 [..., O, I]."""
    if q.dtype == torch.int8:
        return q
    return torch.stack((q & 15, q >> 4), -1).flatten(-2).to(torch.int8) - 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """`q` of codes in int8, [..., O, I]."""
    if bits == 8:
        return codes
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def check_groups(inputs: int, how: Quantize) -> None:
    """Raises ValueError where `how` cannot group so many inputs."""
    if how.bits == 8 or not inputs % how.group:
        return
    divisor = inputs & -inputs
    use = f"use {divisor}" if divisor >= 16 else "use bits: 8"
    raise ValueError(f"group: {how.group} does not divide the {inputs} inputs of a weight; {use}")


def _check(weight: Tensor, how: Quantize) -> None:
    check_groups(weight.size(-1), how)
    if not weight.isfinite().all():
        raise ValueError("a weight is not a number; check the checkpoint")


def _group(inputs: int, how: Quantize) -> int:
    return inputs if how.bits == 8 else how.group


def _scale(grouped: Tensor, bits: int) -> Tensor:
    """The bf16 scale of each group [..., group] that loses least, [..., 1]."""
    if bits == 8:
        return (grouped.abs().amax(-1, keepdim=True) / 127).bfloat16()
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    best = (largest / -_STEPS[0]).bfloat16()
    least = _loss(grouped, best)
    for steps in _STEPS[1:]:
        scale = (largest / -steps).bfloat16()
        loss = _loss(grouped, scale)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


def _loss(grouped: Tensor, scale: Tensor) -> Tensor:
    return (_codes(grouped, scale, 4) * scale - grouped).square().sum(-1, keepdim=True)


def _codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes, in the dtype of `weight`; of a group of zeros, zeros."""
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    wide = scale.to(weight.dtype)
    return (weight / wide.masked_fill(wide == 0, 1)).round().clamp(low, high)


class _Rounding:
    """Columns become what has a code; the scale of a group is set when its first column is reached."""

    def __init__(self, weight_OI: Tensor, how: Quantize) -> None:
        self.bits, self.group = how.bits, _group(weight_OI.size(-1), how)
        self.scales: list[Tensor] = []
        if how.bits == 8:
            self.scales.append(_scale(weight_OI, 8).squeeze(-1))

    def settle(self, block_OB: Tensor, importance_B: Tensor, column: int) -> Tensor:
        if self.bits == 4 and column % self.group == 0:
            self.scales.append(_scale(block_OB[:, column : column + self.group], 4).squeeze(-1))
        scale = self.scales[-1]
        return _codes(block_OB[:, column], scale, self.bits) * scale
