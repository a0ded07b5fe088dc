"""Weights of experts that are zero stay zero while others learn (`train.keep_zeros`): what slimming left out."""

from __future__ import annotations

import torch
from torch import nn

from ..parallel.expert import expert_parameter_names
from ..parallel.tensor import local


@torch.no_grad()
def keep_zeros(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """From now on every step of `optimizer` leaves at zero what of this rank's experts is zero in `model`.

    A gradient of zero would not do: optimizers that mix the entries of a matrix would move them all the same.
    """
    experts = expert_parameter_names(model)
    masks = [(p, local(p) != 0) for name, p in model.named_parameters() if name in experts and p.requires_grad]
    masks = [(p, kept) for p, kept in masks if not kept.all()]

    @torch.no_grad()
    def restore(*_: object) -> None:
        for p, kept in masks:
            local(p).mul_(kept)

    if masks:
        optimizer.register_step_post_hook(restore)
