"""What the folder of a run says, finished or not, written by this version or an earlier one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...launch.config import TrainConfig
from ...launch.errors import UserError
from ...launch.metrics import FILE_NAME, read_metrics
from ...launch.run_folder import RunFolder
from ...launch.settings import parse_config
from ...launch.strict_yaml import read_yaml

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run as it stands on the disk."""

    name: str
    """The end of its path, as much of it as tells it from the other runs."""
    path: Path
    config: Mapping[str, Any]
    """The resolved configuration as plain values: one of an earlier version, which has other keys, is as good."""
    parsed: TrainConfig | None
    """The same; None where it has keys or values that this version does not know."""
    config_text: str
    lines: Sequence[Line]
    """Metrics of training, by step."""
    evaluations: Sequence[Line]
    starts: Sequence[Line]
    """One `start` event for each session."""
    summary: Mapping[str, Any]
    """summary.json; empty where the run has not ended."""
    ledger: Mapping[str, Any]
    """ledger.json; empty where there is none."""
    written: datetime
    """When the run last wrote metrics (or began)."""

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path of the configuration; `default` where it is missing."""
        value: Any = self.config
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    @property
    def steps(self) -> int:
        """Steps known to be done."""
        return max((line["step"] for line in (*self.lines, *self.evaluations)), default=0)

    @property
    def world(self) -> int | None:
        """Ranks of the last session."""
        return self.starts[-1].get("world") if self.starts else self.summary.get("world")

    def world_at(self, step: int) -> int | None:
        """Ranks that computed `step` (from 1): a run may go on with more or fewer."""
        return next((start.get("world") for start in reversed(self.starts) if start["step"] < step), self.world)

    @property
    def experts(self) -> int:
        """Routed experts of a layer, of the fullest where layers differ; 0 where the model has none."""
        counts = self.get("model.moe.per_layer")
        return max(counts) if counts else self.get("model.moe.experts", 0)

    def layer_numbers(self, count: int) -> list[int]:
        """Which layers of the model the `count` entries of a list per expert layer stand for, from 0."""
        every, first = self.get("model.moe.every", 1), self.get("model.moe.first_dense", 0)
        numbers = [i for i in range(self.get("model.layers", count)) if i >= first and (i + 1) % every == 0]
        if counts := self.get("model.moe.per_layer"):
            numbers = [i for i, experts in enumerate(counts) if experts]
        return numbers if len(numbers) == count else list(range(count))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the folders `paths` (at least one); UserError where one is no run or is given twice."""
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError(f"{path} is given twice; name each run once")
    return [read_run(path, name) for path, name in zip(paths, _names(resolved), strict=True)]


def read_run(path: Path, name: str) -> Run:
    """The run in the folder `path`; UserError where it is none or its files are damaged."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"{path} is not a run: it has no config.yaml; give the log.dir of a training run")
    config = read_yaml(folder.config)
    if not isinstance(config, Mapping):
        raise UserError(f"{folder.config}: not the configuration of a run; give the log.dir of a training run")
    metrics = [line for line in read_metrics(path) if isinstance(line.get("step"), int)]
    newest = path / FILE_NAME if (path / FILE_NAME).exists() else folder.config
    return Run(
        name=name,
        path=path,
        config=config,
        parsed=_parsed(config),
        config_text=folder.config.read_text(encoding="utf-8"),
        lines=[line for line in metrics if "loss" in line],
        evaluations=[line for line in metrics if "val_loss" in line],
        starts=[line for line in metrics if line.get("event") == "start"],
        summary=read_object(folder.summary),
        ledger=read_object(folder.ledger),
        written=datetime.fromtimestamp(newest.stat().st_mtime, UTC),
    )


def finite(value: Any) -> float | None:
    """`value` where it is a finite number, else None: a loss that was not finite, a key that is missing."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def finite_values(lines: Iterable[Line], key: str) -> list[float]:
    """The finite numbers under `key`."""
    values = (finite(line.get(key)) for line in lines)
    return [value for value in values if value is not None]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration as dotted paths and values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{path}.")
        else:
            found[path] = value
    return found


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in the file at `path`, empty where there is none; UserError where that holds anything else."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it to have a report without it") from None
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: not a JSON object; remove it to have a report without it")
    return value


def _parsed(config: Mapping[str, Any]) -> TrainConfig | None:
    try:
        return parse_config(config, "config.yaml")
    except UserError:
        return None


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of `paths` that differ."""
    length = 1
    while True:
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        length += 1
