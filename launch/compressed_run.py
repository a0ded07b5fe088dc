"""Drop plans applied to checkpoints where these are runs: what becomes of their configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..moe.compress.apply import Applied, Rewrite, RunConfig
from ..moe.compress.apply import apply_plan as apply_to_checkpoint
from ..moe.compress.plan import DropPlan, Shape
from ..moe.compress.shapes import model_of_shape
from ..moe.compress.writing import Transform
from ..parallel.config import ParallelConfig
from .config import TrainConfig
from .errors import UserError
from .run_folder import RunFolder
from .settings import as_mapping, dump_config, parse_config

__all__ = ["apply_plan", "rewriter"]


def apply_plan(
    source: Path | str,
    target: Path | str,
    plan: DropPlan,
    *,
    transform: Transform | None = None,
    shard_bytes: int = 2 * 2**30,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Applied:
    """As `moe.compress.apply.apply_plan`, of runs too. Raises UserError where a run's configuration cannot be."""
    rewrite = rewriter(Path(source), Path(target))
    return apply_to_checkpoint(
        source, target, plan, rewrite=rewrite, transform=transform, shard_bytes=shard_bytes, progress=progress
    )


def rewriter(source: Path, target: Path) -> Rewrite:
    """What config.yaml of the run at `source` becomes at `target`: its layers and experts, and the place of its log.

    Everything reads a run's configuration, so that it must be a legal one: a layout of ranks that does not fit what is
    left becomes that of one rank, and recomputation that has no plan of unlike layers becomes full.
    """

    def rewrite(shape: Shape) -> RunConfig:
        before = RunFolder(source).load_config()
        config = replace(
            before,
            model=model_of_shape(before.model, shape),
            # The run to be starts from what was left of this one.
            checkpoint=replace(before.checkpoint, resume="auto"),
            log=replace(before.log, dir=str(target)),
        )
        error: UserError | None = None
        for change in _changes(config):
            try:
                legal = parse_config(as_mapping(replace(config, **change)), str(source))
            except UserError as refusal:
                error = error or refusal
            else:
                notes = tuple(_NOTES[name] for name in change if name in _NOTES)
                return RunConfig(dump_config(legal), as_mapping(legal), notes)
        assert error is not None
        raise error

    return rewrite


_NOTES = {
    "parallel": "parallel: the layout of ranks does not fit what is left, and is that of one rank now",
    "recompute": "recompute.mode: lynx has no plan of layers that differ, and is full now",
}


def _changes(config: TrainConfig) -> list[dict[str, Any]]:
    """What to change where the one before was not enough."""
    alone: dict[str, Any] = {"parallel": ParallelConfig(), "train": replace(config.train, nproc=1)}
    if config.recompute.mode != "lynx":
        return [{}, alone]
    full: dict[str, Any] = {"recompute": replace(config.recompute, mode="full")}
    return [{}, full, alone, alone | full]
