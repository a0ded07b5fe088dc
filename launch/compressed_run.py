"""Drop plans applied to checkpoints where these are runs: what becomes of their configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..moe.compress.apply import Applied
from ..moe.compress.apply import apply_plan as apply_to_checkpoint
from ..moe.compress.plan import DropPlan, Shape
from ..moe.compress.shapes import model_of_shape
from ..moe.compress.writing import Transform
from ..parallel.config import ParallelConfig
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


def rewriter(source: Path, target: Path) -> Callable[[Shape], tuple[str, Mapping[str, Any]]]:
    """What config.yaml of the run at `source` becomes at `target`: its layers and experts, and the place of its log.

    A layout of ranks that does not fit what is left becomes that of one rank: everything reads a run's configuration,
    and none may refuse.
    """

    def rewrite(shape: Shape) -> tuple[str, Mapping[str, Any]]:
        before = RunFolder(source).load_config()
        config = replace(
            before,
            model=model_of_shape(before.model, shape),
            # The run to be starts from what was left of this one.
            checkpoint=replace(before.checkpoint, resume="auto"),
            log=replace(before.log, dir=str(target)),
        )
        try:
            config = parse_config(as_mapping(config), str(source))
        except UserError:
            alone = replace(config, parallel=ParallelConfig(), train=replace(config.train, nproc=1))
            config = parse_config(as_mapping(alone), str(source))
        return dump_config(config), as_mapping(config)

    return rewrite
