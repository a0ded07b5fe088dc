"""Megatron-Core trains: its GPTModel, its pipeline schedule and its reduction of gradients, around our router.

The weights are those of our decoder, whose memory Megatron's model shares (`megatron_model.py`). So the optimizer sees
the matrices that it sees natively, checkpoints are the native ones, and a run goes on under either engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ...parallel.gradients import Gradients
from ..data import Samples
from ..evaluate import Evaluation, judged
from ..optimizer import make_optimizer
from ..step import StepResult
from .checkpoints import DecoderCheckpoints
from .decoder import count_parameters, generate_from, new_decoder, parameter_sizes
from .engine import Ground, Restored
from .megatron_groups import make_groups
from .megatron_model import MegatronModel
from .megatron_step import MegatronStepper


class MegatronEngine:
    """See `engine.Engine`."""

    def __init__(self, ground: Ground) -> None:
        """Builds everything on this rank."""
        self.ground = ground
        config, mesh = ground.config, ground.mesh
        self._alone = make_groups(config, mesh)
        self.decoder = new_decoder(ground)
        self.optimizer = make_optimizer(self.decoder, config.optimizer)
        gradients = Gradients(self.decoder, mesh, config.parallel.bucket_bytes)
        samples = Samples(ground.train, config.data.seq_len, config.train.seed)
        self.model = MegatronModel(config, mesh, self.decoder, ground.piece_bytes)
        self.stepper = MegatronStepper(config, mesh, self.decoder, self.optimizer, gradients, samples, self.model)
        self.checkpoints = DecoderCheckpoints(ground, self.decoder, self.optimizer)

    def restore(self) -> Restored | None:
        restored = self.checkpoints.restore()
        self.model.refresh()
        return restored

    def step(self, step: int, first_sample: int, stop: bool) -> StepResult:
        return self.stepper.step(step, first_sample, stop)

    def evaluate(self, progress: Callable[[int, int], None]) -> Evaluation:
        """By Megatron's model, in its schedule."""
        config, model = self.ground.config, self.model

        def forward(*batch: Tensor) -> Tensor:
            return model(*batch)[0]

        def judge(tokens_BS: Tensor, targets_BS: Tensor, text: int) -> Tensor | None:
            losses = model.run([(tokens_BS, targets_BS)], forward, tokens=1, forward_only=True)
            return losses[0] if losses else None

        model.eval()
        result = judged(
            judge,
            self.ground.held_out,
            self.ground.mesh,
            seq_len=config.data.seq_len,
            batch=config.train.eval_batch,
            progress=progress,
        )
        model.train()
        return result

    def evaluate_teacher(self, progress: Callable[[int, int], None]) -> Evaluation | None:
        return None

    def generate(self, prompt: list[int], count: int) -> list[int]:
        return generate_from(self.decoder, self.ground.config, prompt, count)

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        self.checkpoints.save(step, meta)

    def wait(self) -> None:
        self.checkpoints.wait()

    def close(self) -> None:
        self.checkpoints.close()
        parallel_state.destroy_model_parallel()
        if self._alone:
            dist.destroy_process_group()

    def num_parameters(self) -> int:
        return count_parameters(parameter_sizes(self.decoder), self.ground.mesh)

    def recomputed_seconds(self) -> tuple[float, float]:
        return 0.0, 0.0

    def planned(self) -> dict[str, Any]:
        return {}

    def look(self) -> None:
        pass
