"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path

from ..parallel.checkpoint import Checkpointer, newest
from .config import TrainConfig
from .errors import UserError


def find_resumed(config: TrainConfig, checkpoints: Checkpointer) -> Path | None:
    """The checkpoint that `checkpoint.resume` asks for: newest of this run, none, or a path (folder or run)."""
    if config.checkpoint.resume == "auto":
        return checkpoints.latest()
    if config.checkpoint.resume == "never":
        return None
    return checkpoint_in(Path(config.checkpoint.resume))


def checkpoint_in(path: Path) -> Path:
    """A checkpoint's folder from itself, its `checkpoints` folder or its run; UserError where there is none."""
    refuse_deepspeed(path)
    for folder in (path, path / "checkpoints"):
        if folder.name.startswith("step-") and folder.is_dir():
            return folder
        found = newest(folder) if folder.is_dir() else None
        if found is not None:
            return found
    raise UserError(f"{path} holds no complete checkpoint; give a run, or one of its checkpoints/step-…")


def refuse_deepspeed(path: Path) -> None:
    """Raises UserError where `path`, a run, its `checkpoints` or one of them, holds files of DeepSpeed."""
    patterns = ("*_model_states.pt", "*/*_model_states.pt", "*/*/*_model_states.pt")
    if any(any(path.glob(pattern)) for pattern in patterns):
        raise UserError(
            f"{path} holds checkpoints of engine: deepspeed; make it a run of ours first: "
            f"wastenot convert from-deepspeed {path} NEW"
        )
