"""wastenot's own runtime: every layout, every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...parallel.gradients import Gradients
from ..data import Samples
from ..evaluate import Evaluation
from ..freeze import freeze
from ..optimizer import make_optimizer
from ..step import StepResult, make_stepper
from ..teacher import Teacher, open_teacher
from ..zeros import keep_zeros
from .checkpoints import DecoderCheckpoints
from .decoder import count_parameters, evaluate_decoder, generate_from, new_decoder, parameter_sizes
from .engine import Ground, Restored

if TYPE_CHECKING:
    from ..recompute_loop import RecomputeLoop


class NativeEngine:
    """See `engine.Engine`."""

    def __init__(self, ground: Ground) -> None:
        """Builds everything on this rank."""
        self.ground = ground
        config, mesh = ground.config, ground.mesh
        self.model = new_decoder(ground)
        freeze(self.model, config.train.only)
        self.teacher: Teacher | None = None
        if config.train.distill is not None:
            ground.watchdog.at(0, "loading")
            self.teacher = open_teacher(config, mesh, ground.tokenizer, ground.piece_bytes)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        gradients = Gradients(self.model, mesh, config.parallel.bucket_bytes)
        samples = Samples(ground.train, config.data.seq_len, config.train.seed)
        self.stepper = make_stepper(config, mesh, self.model, self.optimizer, gradients, samples, self.teacher)
        self.recompute: RecomputeLoop | None = None
        if config.recompute.mode == "lynx":
            # Imported here: planners take a second that others need not spend.
            from ..recompute_loop import RecomputeLoop

            self.recompute = RecomputeLoop(config, mesh, self.model, self.optimizer, ground.say)
        self.checkpoints = DecoderCheckpoints(ground, self.model, self.optimizer)

    def restore(self) -> Restored | None:
        restored = self.checkpoints.restore(self._check)
        if restored is not None and restored.meta is not None and self.recompute is not None:
            self.recompute.load(restored.meta.get("recompute"))
        if self.ground.config.train.keep_zeros:
            keep_zeros(self.model, self.optimizer)
        return restored

    def _check(self, saved: Mapping[str, Any], path: Path) -> None:
        if self.teacher is not None:
            self.teacher.check_same(saved.get("teacher"), path)

    def step(self, step: int, first_sample: int, stop: bool) -> StepResult:
        done: list[StepResult] = []

        def run() -> Tensor:
            done.append(self.stepper.step(step, first_sample, stop))
            return done[0].counts

        if self.recompute is None:
            run()
        else:
            self.recompute.step(run)
        return done[0]

    def evaluate(self, progress: Callable[[int, int], None]) -> Evaluation:
        return evaluate_decoder(self.model, self.ground, progress)

    def evaluate_teacher(self, progress: Callable[[int, int], None]) -> Evaluation | None:
        return None if self.teacher is None else evaluate_decoder(self.teacher.model, self.ground, progress)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        return generate_from(self.model, self.ground.config, prompt, count)

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        more: dict[str, Any] = {}
        if self.recompute is not None:
            more["recompute"] = self.recompute.state()
        if self.teacher is not None:
            more["teacher"] = dict(self.teacher.chosen)
        self.checkpoints.save(step, {**meta, **more})

    def wait(self) -> None:
        self.checkpoints.wait()

    def close(self) -> None:
        self.checkpoints.close()

    def num_parameters(self) -> int:
        return count_parameters(parameter_sizes(self.model), self.ground.mesh)

    def recomputed_seconds(self) -> tuple[float, float]:
        return self.model.recomputation.spent.take()

    def planned(self) -> dict[str, Any]:
        return {} if self.recompute is None else self.recompute.numbers()

    def look(self) -> None:
        if self.recompute is not None:
            self.recompute.look()
