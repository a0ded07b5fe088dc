"""Activation recomputation: backward computes again what it reads, instead of having it kept since forward.

    none        nothing is computed again
    selective   what is local to a rank and large: hidden activations of experts and dense feed-forward layers
    full        whole blocks, with all that they send to other ranks (Megatron-LM, arXiv 2205.05198, section 5)
    lynx        what a plan says, operator by operator, under communication as far as that lasts (arXiv 2406.08756)

torch.utils.checkpoint and recomputation.py do the work; here is what is done where. A model asks once for each layer,
`calls_of`, how to call its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .config import RecomputeConfig
from .recomputation import During, Recomputation, Spent, nothing
from .stopwatch import Stopwatch

Call = Callable[..., Any]
"""call(function, *args) -> function(*args). Where it computes again, it keeps `args` and nothing else."""


def plainly(function: Callable[..., Any], *args: Any) -> Any:
    """The call itself."""
    return function(*args)


def locally(spent: Spent, function: Callable[..., Any], *args: Any) -> Any:
    """Computes again a function that draws no random numbers and sends nothing."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(_timed(function, spent), *args, use_reentrant=False, preserve_rng_state=False)


def wholly(spent: Spent, function: Callable[..., Any], *args: Any) -> Any:
    """Computes again a function with the random numbers that it drew, and sends again what it sent.

    Ranks that called it together do so again together: in backward, when the first of its nodes is reached. What
    follows its last node that keeps something is left out.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(_timed(function, spent), *args, use_reentrant=False)


def _timed(function: Callable[..., Any], spent: Spent) -> Callable[..., Any]:
    """`function`, of which every call but the first is recomputation that nothing hides."""
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            return function(*args)
        watch = Stopwatch(next((arg.device for arg in args if isinstance(arg, Tensor)), torch.device("cpu")))
        try:
            return function(*args)
        finally:
            # Also where it ends early, with all that was wanted.
            spent.exposed.append(watch.stop())

    return call


class Operator(Protocol):
    """Calls what a layer does between two exchanges, by the planner's name for it (lynx/work.py)."""

    def __call__(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args). Tensors that the function changes with come as arguments; it sends nothing, unless it is an
        operator that no plan may compute again."""
        ...


def by_name(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """The call itself."""
    return function(*args)


class Windows(Protocol):
    """What a layer does while it communicates, by the planner's name for the window."""

    def __call__(self, name: str, forward: bool = False) -> During:
        """Of the layer's backward, or of its forward."""
        ...


def no_window(name: str, forward: bool = False) -> During:
    """Nothing."""
    return nothing


@dataclass(frozen=True)
class Calls:
    """How a layer of a model calls its parts."""

    block: Call = plainly
    """A layer of the model: from hidden states to hidden states."""
    hidden: Call = plainly
    """A feed-forward network, or the experts of this rank, as far as nothing travels: it keeps the rows that go in."""
    operator: Operator = by_name
    windows: Windows = no_window


PLAIN = Calls()


def calls_of(config: RecomputeConfig, recomputation: Recomputation, layer: int) -> Calls:
    """What `config` asks for in layer number `layer` of a model with this `recomputation`, whose names begin so."""
    spent = recomputation.spent
    if config.mode == "selective":
        return Calls(hidden=partial(locally, spent))
    if config.mode == "full":
        return Calls(block=partial(wholly, spent))
    if config.mode == "none":
        return PLAIN
    return Calls(operator=partial(_operator, recomputation, layer), windows=partial(_window, recomputation, layer))


def qualified(layer: int, name: str) -> str:
    """Name of an operator or a window of a layer, among those of the model."""
    return f"{layer}.{name}"


def _operator(recomputation: Recomputation, layer: int, name: str, function: Callable[..., Any], *args: Any) -> Any:
    return recomputation.segment(qualified(layer, name), function, *args)


def _window(recomputation: Recomputation, layer: int, name: str, forward: bool = False) -> During:
    return recomputation.window(qualified(layer, name), forward)
