"""Parameters whose second moment is kept whole: vectors, and matrices too small to profit (METHODS A5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .bias import bias
from .factors import is_stack, wide
from .guidance import guidance
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
    lacks1, lacks2 = bias(group, int(state["step"].item()))
    update = moment.div(lacks2).sqrt_().add_(group["eps"])
    update = torch.div(grad, update, out=update)
    # Experts of a stack are clipped one by one.
    dims = (1, 2) if is_stack(weight) else tuple(range(weight.dim()))
    squares = shards.over_matrix(update.double().square().sum(dims, keepdim=True))
    whole = parameter if shards.exact else weight
    size = math.prod(whole.size(dim) for dim in dims)
    clip = (squares / max(1, size)).sqrt().div_(group["clip_threshold"]).clamp_(min=1)
    update.div_(clip.to(dtype))
    step: float | Tensor = group["lr"]
    if "exp_avg" in state:
        kept = {key: local(state[key]) for key in ("exp_avg", "exp_avg_scale") if key in state}
        flat = {key: value.reshape(1, -1) if weight.dim() < 2 else value for key, value in kept.items()}
        average = read(flat, _ALL, dtype)
        average.lerp_(update.view_as(average), 1 - beta1)
        write(flat, _ALL, average)
        average = average.view_as(weight)
        if group["guidance"]:
            pairs = ((update, average), (update, update), (average, average))
            sums = [shards.over_matrix((a.double() * b).sum(dims, keepdim=True)) for a, b in pairs]
            step = (guidance(sums[0], sums[1], sums[2], group["eps"]) * group["lr"]).to(dtype)
        update = average / lacks1
    if group["weight_decay"]:
        weight.mul_(1 - step * group["weight_decay"])
    weight.sub_(update * step)
