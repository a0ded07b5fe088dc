"""Activation recomputation: backward computes again what it reads, instead of having it kept since forward.

    none        nothing is computed again
    selective   what is local to a rank and large: hidden activations of experts and dense feed-forward layers
    full        whole blocks, with all that they send to other ranks (Megatron-LM, arXiv 2205.05198, section 5)

torch.utils.checkpoint does the work; here is what is done where. A model asks once, `calls_of`, how to call its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .config import RecomputeConfig

Call = Callable[..., Any]
"""call(function, *args) -> function(*args). Where it computes again, it keeps `args` and nothing else."""


def plainly(function: Callable[..., Any], *args: Any) -> Any:
    """The call itself."""
    return function(*args)


def locally(function: Callable[..., Any], *args: Any) -> Any:
    """Computes again a function that draws no random numbers and sends nothing."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def wholly(function: Callable[..., Any], *args: Any) -> Any:
    """Computes again a function with the random numbers that it drew, and sends again what it sent.

    Ranks that called it together do so again together: in backward, when the first of its nodes is reached. What
    follows its last node that keeps something is left out.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)


@dataclass(frozen=True)
class Calls:
    """How a model calls its parts."""

    block: Call = plainly
    """A layer of the model: from hidden states to hidden states."""
    hidden: Call = plainly
    """A feed-forward network, or the experts of this rank, as far as nothing travels: it keeps the rows that go in."""


PLAIN = Calls()
_CALLS = {"none": PLAIN, "selective": Calls(hidden=locally), "full": Calls(block=wholly)}


def calls_of(config: RecomputeConfig) -> Calls:
    """What `config` asks for."""
    return _CALLS[config.mode]
