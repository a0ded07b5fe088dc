"""Checkpoints of our decoder and the optimizer that steps it: one format under every engine that has both.

So a run goes on under another engine or layout, and every tool reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...moe.decoder import Decoder
from ...parallel.checkpoint import Checkpointer
from ...parallel.checkpoint import read_meta as read_checkpoint_meta
from ...parallel.expert import expert_parameter_names
from ...parallel.training_state import load_training_state, training_state
from ..errors import UserError
from ..optimizer_config import refuse_state_of_others
from ..resumed import find_resumed
from ..saved_run import refuse_quantized
from ..start import load_start
from .engine import Ground, Restored


def start_of(ground: Ground, model: Decoder) -> Restored | None:
    """Fills the new `model` with the weights of `train.start`, if that names a run; all ranks call it together."""
    run = ground.config.train.start
    if run is None:
        return None
    ground.watchdog.at(0, "loading")
    return Restored(load_start(run, model, ground.mesh, ground.tokenizer), None, False)


class DecoderCheckpoints:
    """Saves and restores `model` and `optimizer`, each rank its part; all ranks make the same calls."""

    def __init__(self, ground: Ground, model: Decoder, optimizer: torch.optim.Optimizer) -> None:
        self.ground, self.model, self.optimizer = ground, model, optimizer
        config = ground.config.checkpoint
        self.checkpointer = Checkpointer(
            ground.folder.checkpoints, ground.mesh, keep=config.keep, asynchronous=config.asynchronous
        )
        experts = expert_parameter_names(model)
        self.is_expert = lambda name: name in experts

    def restore(self, check: Callable[[Mapping[str, Any], Path], None] = lambda meta, path: None) -> Restored | None:
        """Loads what `checkpoint.resume` asks for, or else the weights of `train.start`.

        `check` hears what a run saved beside its state, and raises ValueError where this one cannot go on from it.

        Raises UserError where it cannot be loaded.
        """
        ground = self.ground
        path = find_resumed(ground.config, self.checkpointer)
        ground.watchdog.at(0, "loading")
        if path is None:
            return start_of(ground, self.model)
        try:
            refuse_quantized(path, "be trained")
            # A converted checkpoint holds weights only: the run starts from them, at step 0.
            saved = read_checkpoint_meta(path)
            started = "progress" in saved
            if started:
                refuse_state_of_others(ground.config.optimizer, saved.get("config", {}).get("optimizer", {}), path)
                check(saved, path)
            optimizer = self.optimizer if started else None
            meta = load_training_state(path, self.model, optimizer, ground.mesh, self.is_expert)
        except ValueError as error:
            raise UserError(str(error)) from error
        return Restored(path, meta if started else None, path.parent == ground.folder.checkpoints)

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        """As `Engine.save`."""
        state = training_state(self.model, self.optimizer, self.ground.mesh, self.is_expert)
        self.checkpointer.save(step, state, meta)

    def wait(self) -> None:
        """As `Engine.wait`."""
        self.checkpointer.wait()

    def close(self) -> None:
        """As `Engine.close`."""
        self.checkpointer.close()
