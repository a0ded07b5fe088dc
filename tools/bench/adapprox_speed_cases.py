"""Parameters that `adapprox-speed` steps, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Shapes:
    """Parameters that are stepped together."""

    name: str
    shapes: tuple[tuple[int, ...], ...]


def largest_rank(case: Shapes) -> int:
    """A quarter of the smaller side, of the matrices that have the largest."""
    return max(min(shape[-2:]) for shape in case.shapes if len(shape) > 1) // 4


def made_parameters(case: Shapes, device: str) -> list[nn.Parameter]:
    """The same weights and gradients every time; rows differ in size, so that factors have something to hold."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in case.shapes:
        parameter = nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02)
        scale = torch.rand((*shape[:-1], 1) if len(shape) > 1 else shape, generator=generator, device=device)
        parameter.grad = torch.randn(shape, generator=generator, device=device).mul_(scale * 1e-3)
        made.append(parameter)
    return made
