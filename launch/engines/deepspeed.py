"""DeepSpeed's runtime around our model, router and optimizer: ZeRO 0 to 3, its expert groups, its checkpoints.

Precision is ours: weights, gradients and optimizer state in fp32, matrix products in bf16 under autocast where
`train.precision` says so. DeepSpeed's own bf16 would keep weights in bf16 beside an fp32 copy in the optimizer.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.mesh import Mesh
from ..data import Samples
from ..errors import UserError
from ..evaluate import Evaluation
from ..optimizer import make_optimizer
from ..optimizer_config import refuse_state_of_others
from ..run_folder import differences, write_atomically
from ..settings import as_mapping
from ..step import MicroBatch, Stepper, StepResult
from . import deepspeed_checkpoints as checkpoints
from .checkpoints import start_of
from .decoder import count_parameters, evaluate_decoder, generate_from, new_decoder, parameter_sizes
from .deepspeed_gradients import SharedGradients, WholeGradients
from .deepspeed_json import merged
from .engine import Ground, Restored

_EXPECTED = ("untested optimizer", "unknown inputs or outputs type")
"""In warnings of DeepSpeed: about optimizers that were tried here, and modules whose outputs hold routings."""


class DeepSpeedEngine:
    """See `engine.Engine`."""

    def __init__(self, ground: Ground) -> None:
        """Builds everything on this rank."""
        self.ground = ground
        config, mesh = ground.config, ground.mesh
        self._alone = _prepare(mesh)
        # Only now: what it finds in the environment decides what it is.
        from . import deepspeed_model as ours

        self.decoder = new_decoder(ground)
        self._resumed = self._find()
        # Before DeepSpeed copies weights or cuts them up.
        self._start = start_of(ground, self.decoder) if self._resumed is None else None
        self._sizes = parameter_sizes(self.decoder)
        self.optimizer = make_optimizer(self.decoder, config.optimizer)
        zero, said = config.deepspeed.zero, merged(config, mesh.world.size)
        self._sharing: dict[str, Any] = said["zero_optimization"]
        module = ours.Learning(self.decoder, lambda tokens_BS: self.stepper.forward(tokens_BS))
        if zero and mesh.expert.size > 1:
            ours.split_groups(self.optimizer, ours.group_name(mesh))
        self.engine = self._initialize(module, said)
        if zero and config.optimizer.name == "adapprox":
            # Imported here: the others step parts of weights as they are.
            from ...parallel.optim.zero import follow_zero

            self.optimizer = follow_zero(self.engine)
        if zero == 3:
            ours.gather_output_layer(self.decoder)
        gradients = SharedGradients(self.engine, mesh) if zero else WholeGradients(self.engine, mesh)
        samples = Samples(ground.train, config.data.seq_len, config.train.seed)
        self.stepper = DeepSpeedStepper(config, mesh, self.decoder, self.optimizer, gradients, samples, self.engine)
        if mesh.world.rank == 0:
            ground.folder.path.mkdir(parents=True, exist_ok=True)
            write_atomically(ground.folder.path / "deepspeed.json", json.dumps(said, indent=2) + "\n")

    def _initialize(self, module: torch.nn.Module, said: dict[str, Any]) -> Any:
        import deepspeed
        from deepspeed.utils import logger

        logger.addFilter(lambda record: not any(known in record.getMessage() for known in _EXPECTED))
        try:
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=said, dist_init_required=False
            )
        except Exception as error:
            path = self.ground.config.deepspeed.json
            if path is None or _of_the_machine(error):
                raise
            raise UserError(
                f"deepspeed.json: DeepSpeed does not take what {path} adds: {checkpoints.one_line(error)}"
            ) from error
        return engine

    def _find(self) -> Path | None:
        """The checkpoint that `checkpoint.resume` asks for, the same on all ranks."""
        config, own = self.ground.config, self.ground.folder.checkpoints

        def choose() -> Path | None:
            own.mkdir(parents=True, exist_ok=True)
            checkpoints.clean(own)
            if config.checkpoint.resume == "auto":
                return checkpoints.newest(own)
            return None if config.checkpoint.resume == "never" else checkpoints.find(Path(config.checkpoint.resume))

        self.ground.watchdog.at(0, "loading")
        try:
            return checkpoints.on_root(self.ground.mesh, choose)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error

    def restore(self) -> Restored | None:
        config, mesh, path = self.ground.config, self.ground.mesh, self._resumed
        if path is None:
            return self._start
        self.ground.watchdog.at(0, "loading")
        try:
            saved = checkpoints.read_meta(path)
            checkpoints.refuse_other_layout(path, saved, mesh, config.deepspeed.zero, self._sharing)
            _refuse_other_model(path, saved["config"], as_mapping(config))
            refuse_state_of_others(config.optimizer, saved["config"]["optimizer"], path)
            checkpoints.prove(path, saved, mesh)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        self._load(path)
        return Restored(path, saved, path.parent == self.ground.folder.checkpoints)

    def _load(self, path: Path) -> None:
        optimizer = self.optimizer
        said = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in optimizer.param_groups
        ]
        other = "name another checkpoint in checkpoint.resume"
        try:
            loaded, _ = self.engine.load_checkpoint(str(path.parent), tag=path.name)
        except Exception as error:
            if _of_the_machine(error):
                raise
            raise UserError(f"{path} cannot be loaded ({checkpoints.one_line(error)}); {other}") from error
        if loaded is None:
            raise UserError(f"{path} is not whole; {other}")
        # Decay and the like stay those of the configuration.
        for group, own in zip(optimizer.param_groups, said, strict=True):
            group.update(own)

    def step(self, step: int, first_sample: int, stop: bool) -> StepResult:
        return self.stepper.step(step, first_sample, stop)

    def evaluate(self, progress: Callable[[int, int], None]) -> Evaluation:
        return evaluate_decoder(self.decoder, self.ground, progress)

    def evaluate_teacher(self, progress: Callable[[int, int], None]) -> Evaluation | None:
        return None

    def generate(self, prompt: list[int], count: int) -> list[int]:
        return generate_from(self.decoder, self.ground.config, prompt, count)

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        config, mesh = self.ground.config, self.ground.mesh
        zero = {"zero": config.deepspeed.zero, "zero_optimization": self._sharing}
        said = {"layout": mesh.layout, **zero, **meta}
        checkpoints.save(self.engine, self.ground.folder.checkpoints, step, said, mesh, config.checkpoint.keep)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        if self._alone:
            dist.destroy_process_group()

    def num_parameters(self) -> int:
        return count_parameters(self._sizes, self.ground.mesh)

    def recomputed_seconds(self) -> tuple[float, float]:
        return self.decoder.recomputation.spent.take()

    def planned(self) -> dict[str, Any]:
        return {}

    def look(self) -> None:
        pass


@dataclass
class DeepSpeedStepper(Stepper):
    """A `Stepper` whose passes and steps go through DeepSpeed."""

    engine: Any

    def _learn(self, tokens_BS: Tensor) -> MicroBatch:
        objective, micro = self.engine(tokens_BS)
        # DeepSpeed averages over all ranks; ours is a part of a sum.
        self.engine.backward(objective * self.mesh.world.size, scale_wrt_gas=False)
        return micro

    def _update(self) -> None:
        self.engine.step()


def _refuse_other_model(path: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    wrong = [each for key in ("model", "router") for each in differences(saved.get(key, {}), here[key], f"{key}.")]
    if wrong:
        raise UserError(f"{path} is of another model ({'; '.join(wrong)}); use its own values, or another checkpoint")


def _of_the_machine(error: Exception) -> bool:
    """Whether `error` says nothing of what was read."""
    return isinstance(error, (torch.OutOfMemoryError, dist.DistError))


def _prepare(mesh: Mesh) -> bool:
    """Before DeepSpeed is imported: on which device it is, and a process group also for a rank alone.

    Returns whether that group was made here.
    """
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)
    if mesh.device.index is not None:
        # It takes the device of this number, and a rank may see its own alone.
        os.environ["LOCAL_RANK"] = str(mesh.device.index)
    os.environ.setdefault("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    # torch's own new names, which DeepSpeed does not use yet.
    warnings.filterwarnings(
        "ignore", r".*(reduce_scatter_tensor|all_gather_into_tensor).* is deprecated", FutureWarning
    )
    import deepspeed

    if mesh.device.type == "cpu":
        # It would be compiled here and now; collectives are gloo's.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
    if dist.is_initialized():
        return False
    backend = "nccl" if mesh.device.type == "cuda" else "gloo"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return True
