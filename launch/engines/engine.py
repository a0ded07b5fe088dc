"""The seam between a run and what trains its model, and the choice among engines.

The loop, its console, metrics, ledger and summary are one for all engines (`launch/trainer.py`); an engine has the
model, the optimizer, the step and the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ...moe.ledger import Ledger
from ...parallel.mesh import Mesh
from ..config import TrainConfig
from ..evaluate import Evaluation
from ..run_folder import RunFolder
from ..shards import TokenShards
from ..step import StepResult
from ..tokenizer import Tokenizer
from ..watchdog import Watchdog


@dataclass(frozen=True)
class Ground:
    """What an engine stands on."""

    config: TrainConfig
    """Complete: the vocabulary's size is known."""
    mesh: Mesh
    """This rank's place; made by us, with the same order of ranks under every engine."""
    folder: RunFolder
    train: TokenShards
    held_out: TokenShards
    tokenizer: Tokenizer
    ledger: Ledger
    watchdog: Watchdog
    piece_bytes: int
    """How an all-to-all is cut."""
    say: Callable[[str], None]
    """Tells the user, on the rank that speaks."""


class Restored(NamedTuple):
    """What a run goes on from."""

    path: Path
    meta: Mapping[str, Any] | None
    """What `Engine.save` was given; None where only weights were there, and the run begins with them."""
    is_own: bool
    """Whether it lies in this run's folder."""


class Engine(Protocol):
    """One rank's part of a model in training. All ranks make the same calls in the same order."""

    optimizer: torch.optim.Optimizer
    """Whose state is measured."""

    def restore(self) -> Restored | None:
        """Loads what `checkpoint.resume` asks for, or the weights of `train.start`; None where the model is new."""
        ...

    def step(self, step: int, first_sample: int, stop: bool) -> StepResult:
        """Trains on samples [first_sample, first_sample + batch); `step` counts from 0."""
        ...

    def evaluate(self, progress: Callable[[int, int], None]) -> Evaluation:
        """The held-out text; `progress` hears (sequences done, sequences in all)."""
        ...

    def evaluate_teacher(self, progress: Callable[[int, int], None]) -> Evaluation | None:
        """The same of the model that this one learns from, if there is one."""
        ...

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """`prompt` and what the model goes on with, `count` tokens at most; the last call of a run."""
        ...

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        """Saves all that decides how the run goes on, and `meta`; may write while training goes on."""
        ...

    def wait(self) -> None:
        """Until what was saved is safe."""
        ...

    def close(self) -> None:
        """Ends what runs beside training."""
        ...

    def num_parameters(self) -> int:
        """Of the whole model, those that other ranks hold included."""
        ...

    def recomputed_seconds(self) -> tuple[float, float]:
        """Spent on this rank since the last call on recomputation: hidden in communication, and exposed."""
        ...

    def planned(self) -> dict[str, Any]:
        """What is expected of a step, for a line of metrics."""
        ...

    def look(self) -> None:
        """After a line of metrics: time to plan anew where the routing has moved."""
        ...


def make_engine(ground: Ground) -> Engine:
    """The engine that the configuration names; all ranks call it together. Imports no other."""
    if ground.config.engine == "deepspeed":
        from .deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(ground)
    if ground.config.engine == "megatron":
        from .megatron import MegatronEngine

        return MegatronEngine(ground)
    from .native import NativeEngine

    return NativeEngine(ground)
