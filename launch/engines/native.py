"""wastenot's own runtime: every layout, every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...parallel.checkpoint import Checkpointer
from ...parallel.checkpoint import read_meta as read_checkpoint_meta
from ...parallel.expert import expert_parameter_names
from ...parallel.gradients import Gradients
from ...parallel.training_state import load_training_state, training_state
from ..data import Samples
from ..errors import UserError
from ..evaluate import Evaluation
from ..freeze import freeze
from ..optimizer import make_optimizer
from ..optimizer_config import refuse_state_of_others
from ..resumed import find_resumed
from ..saved_run import refuse_quantized
from ..start import load_start
from ..step import Stepper, StepResult, make_stepper
from ..teacher import Teacher, open_teacher
from ..zeros import keep_zeros
from .decoder import count_parameters, evaluate_decoder, generate_from, new_decoder
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
        self.stepper = self.make_stepper(gradients, samples)
        self.recompute: RecomputeLoop | None = None
        if config.recompute.mode == "lynx":
            # Imported here: planners take a second that others need not spend.
            from ..recompute_loop import RecomputeLoop

            self.recompute = RecomputeLoop(config, mesh, self.model, self.optimizer, ground.say)
        self.checkpoints = Checkpointer(
            ground.folder.checkpoints, mesh, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
        )
        experts = expert_parameter_names(self.model)
        self.is_expert = lambda name: name in experts

    def make_stepper(self, gradients: Gradients, samples: Samples) -> Stepper:
        """What steps the model; all ranks call it together."""
        ground = self.ground
        return make_stepper(ground.config, ground.mesh, self.model, self.optimizer, gradients, samples, self.teacher)

    def restore(self) -> Restored | None:
        config, mesh = self.ground.config, self.ground.mesh
        path = find_resumed(config, self.checkpoints)
        self.ground.watchdog.at(0, "loading")
        restored = None
        if path is not None:
            try:
                refuse_quantized(path, "be trained")
                # A converted checkpoint holds weights only: the run starts from them, at step 0.
                saved = read_checkpoint_meta(path)
                started = "progress" in saved
                if started:
                    refuse_state_of_others(config.optimizer, saved.get("config", {}).get("optimizer", {}), path)
                    if self.teacher is not None:
                        self.teacher.check_same(saved.get("teacher"), path)
                optimizer = self.optimizer if started else None
                meta = load_training_state(path, self.model, optimizer, mesh, self.is_expert)
            except ValueError as error:
                raise UserError(str(error)) from error
            if started and self.recompute is not None:
                self.recompute.load(meta.get("recompute"))
            restored = Restored(path, meta if started else None, path.parent == self.ground.folder.checkpoints)
        elif config.train.start is not None:
            start = load_start(config.train.start, self.model, mesh, self.ground.tokenizer)
            restored = Restored(start, None, False)
        if config.train.keep_zeros:
            keep_zeros(self.model, self.optimizer)
        return restored

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
        state = training_state(self.model, self.optimizer, self.ground.mesh, self.is_expert)
        more: dict[str, Any] = {}
        if self.recompute is not None:
            more["recompute"] = self.recompute.state()
        if self.teacher is not None:
            more["teacher"] = dict(self.teacher.chosen)
        self.checkpoints.save(step, state, {**meta, **more})

    def wait(self) -> None:
        self.checkpoints.wait()

    def close(self) -> None:
        self.checkpoints.close()

    def num_parameters(self) -> int:
        sizes = [(self.is_expert(name), p.numel()) for name, p in self.model.named_parameters()]
        return count_parameters(sizes, self.ground.mesh)

    def recomputed_seconds(self) -> tuple[float, float]:
        return self.model.recomputation.spent.take()

    def planned(self) -> dict[str, Any]:
        return {} if self.recompute is None else self.recompute.numbers()

    def look(self) -> None:
        if self.recompute is not None:
            self.recompute.look()
