"""What dtype weights have and what dtype matrix products run in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def weight_dtype(precision: str) -> torch.dtype:
    """Weights, gradients and optimizer state: fp64 for `fp64`, else fp32."""
    return torch.float64 if precision == "fp64" else torch.float32


def compute_dtype(precision: str) -> torch.dtype:
    """What matrix products run in."""
    return torch.bfloat16 if precision == "bf16" else weight_dtype(precision)


def computing_in(precision: str, device: torch.device) -> AbstractContextManager:
    """bf16 autocast for `bf16`; nothing otherwise."""
    # The cache would hold bf16 copies of all weights until the context ends; experts cast their own.
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
