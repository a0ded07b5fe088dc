"""Our optimizers by name for transformers.Trainer, whose `optim` knows its own only and has no place to add others.

    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizer("adapprox", args))

Trainer makes the parameter groups (no weight decay on norms and biases), steps the learning rate, and saves and resumes
the state with its checkpoints, as it does with its own.
"""

from __future__ import annotations

import difflib
from typing import Any, Protocol

import torch
from torch import nn

from ...parallel.optim import Adapprox

__all__ = ["name_parameters_", "optimizer"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adapprox": Adapprox}


class TrainingArguments(Protocol):
    """What is read of transformers.TrainingArguments."""

    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float


def optimizer(name: str, args: TrainingArguments, **options: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What Trainer takes as `optimizer_cls_and_kwargs`; learning rate, betas, eps and weight decay are those of `args`.

    name: adapprox. options: further ones of that class, say `max_rank=64, momentum="int8"`.

    Raises ValueError where there is no such optimizer or an option has no such value, TypeError where it has no such
    option: here, not in the middle of Trainer's preparations.
    """
    found = OPTIMIZERS.get(name)
    if found is None:
        close = difflib.get_close_matches(name.lower(), OPTIMIZERS, n=1, cutoff=0.3)
        nearest = f"; nearest: {close[0]}" if close else ", and TrainingArguments(optim=...) has others"
        raise ValueError(f"optimizer: {name!r} is not one of {', '.join(OPTIMIZERS)}{nearest}")
    betas = args.adam_beta1, args.adam_beta2
    usual = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
    found([nn.Parameter(torch.zeros(1))], **(usual | options))
    return found, usual | options


def name_parameters_(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Tells `optimizer` the names that its parameters have in `model`, for its errors and its `report()`.

    Trainer does not: call it with `trainer.create_optimizer()` and `trainer.model`.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]
