"""The model that a run learns from (`train.distill`): another run, laid out over the same ranks, frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.distillation import linear_distillation
from ..moe.config import dropless
from ..moe.decoder import Decoder
from ..parallel import vocabulary_distillation
from ..parallel.apply import free_gathered, parallelize
from ..parallel.collectives import share_from_root
from ..parallel.expert import expert_parameter_names
from ..parallel.manifest import FILE
from ..parallel.mesh import Mesh
from ..parallel.training_state import load_training_state
from ..parallel.vocabulary import spread_targets
from .config import DistillConfig, TrainConfig
from .errors import UserError
from .precision import compute_dtype, weight_dtype
from .run_folder import RunFolder
from .saved_run import find_checkpoint
from .start import refuse_other_tokenizer
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Teacher:
    """A model, and how much it counts."""

    model: Decoder
    """This rank's part of it, without gradients."""
    config: DistillConfig
    chosen: Mapping[str, str]
    """`checkpoint`, its folder's name, and `fingerprint`; checkpoints of the run that learns note it."""

    def check_same(self, before: Mapping[str, str] | None, path: Path) -> None:
        """Raises UserError where the run at `path` learned from another until now; `before`: what it noted, if it did.

        A teacher that was trained on is another.
        """
        if before is None or before["fingerprint"] == self.chosen["fingerprint"]:
            return
        was, now = (f"{each['checkpoint']} ({each['fingerprint']})" for each in (before, self.chosen))
        raise UserError(
            f"train.distill.teacher: {path} learned from {was} of {self.config.teacher}, whose newest is now {now}; "
            "put the former back, or begin in another log.dir"
        )

    def loss_sums(self, student: Decoder, hidden_BSD: Tensor, tokens_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of windows `tokens_BS`, which `student` made `hidden_BSD` of: see `linear_distillation`."""
        with torch.no_grad():
            taught_BSD = self.model(tokens_BS[:, :-1]).hidden_BSD
            taught_TD, taught_VD = self.model.output_operands(taught_BSD)
        hidden_TD, weight_VD = student.output_operands(hidden_BSD)
        operands, targets_BS = (hidden_TD, weight_VD, taught_TD, taught_VD), tokens_BS[:, 1:]
        mix, temperature, mesh = self.config.weight, self.config.temperature, student.mesh
        if mesh.tensor.group is None:
            targets_T = targets_BS.reshape(-1)
            sums = linear_distillation(*operands, targets_T, mix, temperature, student.backend)
        else:
            targets_GT = spread_targets(targets_BS, mesh)
            sums = vocabulary_distillation.linear_distillation(*operands, targets_GT, mix, temperature, mesh)
        free_gathered(self.model, mesh)
        return sums


def open_teacher(config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer, piece_bytes: int) -> Teacher:
    """The teacher that `config` names, in the run's precision; all ranks call it together.

    Raises UserError where it has other tokens, or its checkpoint is damaged or of another precision.
    """
    distill = config.train.distill
    assert distill is not None
    folder = RunFolder(distill.teacher)
    refuse_other_tokenizer(folder, tokenizer, "train.distill.teacher")
    saved = folder.load_config()
    size = saved.model.vocab_size or tokenizer.vocab_size
    if size != config.model.vocab_size:
        raise UserError(
            f"train.distill.teacher: {folder.path} has a vocabulary of {size}, the model one of "
            f"{config.model.vocab_size}; use model.vocab_size: {size}"
        )
    chosen = chosen_checkpoint(folder, mesh)
    precision = config.train.precision
    with torch.device("meta"):
        model_config, router = dropless(replace(saved.model, vocab_size=size), saved.router)
        model = Decoder(model_config, router, mesh, piece_bytes, config.kernels)
    model.requires_grad_(False)
    parallelize(model, mesh, lambda name, tensor, generator: None, 0, weight_dtype(precision), compute_dtype(precision))
    try:
        is_expert = expert_parameter_names(model).__contains__
        load_training_state(folder.checkpoints / chosen["checkpoint"], model, None, mesh, is_expert)
    except ValueError as error:
        raise UserError(f"train.distill.teacher: {error}") from error
    return Teacher(model.eval(), distill, chosen)


def chosen_checkpoint(folder: RunFolder, mesh: Mesh) -> Mapping[str, str]:
    """The newest checkpoint as rank 0 finds it: where the teacher still trains, others may find another.

    Raises UserError on all ranks where there is none.
    """
    found: dict[str, str] = {}
    if mesh.world.rank == 0:
        try:
            path = find_checkpoint(folder, None)
            found = {"checkpoint": path.name, "fingerprint": _identity(path)}
        except (UserError, ValueError) as error:
            found = {"error": str(error)}
    found = share_from_root(found, mesh.world, "teacher", mesh.recorder)
    if "error" in found:
        raise UserError(f"train.distill.teacher: {found['error']}")
    return found


def _identity(checkpoint: Path) -> str:
    """Of what a checkpoint holds: its manifest has a sum of every tensor."""
    return hashlib.sha256((checkpoint / FILE).read_bytes()).hexdigest()[:16]
