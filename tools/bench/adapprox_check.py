"""What must hold before figures of Adapprox mean something."""

from __future__ import annotations

import torch
from torch import nn

from ...parallel.optim import Adapprox
from .rectify_methods import DisagreementError

TOLERANCE = 1e-4
"""Largest relative difference of weights."""


def check(device: str = "cpu") -> None:
    """Raises DisagreementError unless Adapprox steps on `device` as with the exact second moment where that has rank 1.

    The expected weights are METHODS A2 in fp64, with V in full.
    """
    generator = torch.Generator().manual_seed(0)
    a_m1, b_1n = torch.rand(48, 1, generator=generator), torch.rand(1, 80, generator=generator)
    weight_mn = torch.randn(48, 80, generator=generator)
    lr, decay, beta1, beta2 = 1e-2, 0.1, 0.9, 0.99
    parameter = nn.Parameter(weight_mn.to(device))
    optimizer = Adapprox([parameter], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    weight_mn = weight_mn.double()
    v_mn, m_mn = torch.zeros_like(weight_mn), torch.zeros_like(weight_mn)
    for step in range(1, 13):
        sign_mn = torch.randint(0, 2, (48, 80), generator=generator) * 2 - 1
        grad_mn = (0.1 + a_m1) * (0.1 + b_1n) * sign_mn * torch.rand((), generator=generator)
        parameter.grad = grad_mn.to(device)
        optimizer.step()
        grad_mn = grad_mn.double()
        v_mn = beta2 * v_mn + (1 - beta2) * grad_mn**2
        update_mn = grad_mn / ((v_mn / (1 - beta2**step)).sqrt() + 1e-8)
        update_mn /= update_mn.square().mean().sqrt().clamp(min=1)
        m_mn = beta1 * m_mn + (1 - beta1) * update_mn
        weight_mn = weight_mn - lr * (m_mn / (1 - beta1**step) + decay * weight_mn)
    error = ((parameter.detach().cpu().double() - weight_mn).norm() / weight_mn.norm()).item()
    # Written so that a NaN disagrees.
    if not error <= TOLERANCE:
        raise DisagreementError(f"Adapprox on gradients of rank 1: weights are {error:.1e} from the exact ones")
