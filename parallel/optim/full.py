"""Parameters whose second moment is kept whole: vectors, and matrices too small to profit (METHODS A5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .factors import wide
from .momentum import read, write
from .shards import Shards, local

_ALL = slice(None)


def step_full(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], shards: Shards) -> None:
    """One step of a parameter of any shape, as A2 has it with the exact second moment."""
    assert parameter.grad is not None
    beta1, beta2 = group["betas"]
    weight, dtype = local(parameter), wide(parameter.dtype)
    grad = local(parameter.grad).to(dtype)
    moment = local(state["exp_avg_sq"])
    moment.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    update = moment.sqrt().add_(group["eps"])
    update = torch.div(grad, update, out=update)
    # Experts of a stack are clipped one by one.
    dims = (1, 2) if weight.dim() == 3 else tuple(range(weight.dim()))
    squares = shards.over_matrix(update.double().square().sum(dims, keepdim=True))
    whole = parameter if shards.exact else weight
    size = math.prod(whole.size(dim) for dim in dims)
    clip = (squares / max(1, size)).sqrt().div_(group["clip_threshold"]).clamp_(min=1)
    update.div_(clip.to(dtype))
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    if "exp_avg" not in state:
        weight.add_(update, alpha=-group["lr"])
        return
    kept = {key: local(state[key]) for key in ("exp_avg", "exp_avg_scale") if key in state}
    flat = {key: value.unsqueeze(0) if value.dim() < 2 else value for key, value in kept.items()}
    if weight.dim() == 0:
        flat = {key: value.reshape(1, -1) for key, value in kept.items()}
    average = read(flat, _ALL, dtype)
    average.lerp_(update.view_as(average), 1 - beta1)
    write(flat, _ALL, average)
    weight.add_(average.view_as(weight), alpha=-group["lr"])
