"""What a run tells about itself while it goes: metrics.jsonl, TensorBoard, console."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object a line, and the same numbers to TensorBoard where it is installed."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.path = folder / FILE_NAME
        mend_last_line(self.path)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = _board(folder / "tensorboard") if tensorboard else None
        self.note = "" if self._board or not tensorboard else "no TensorBoard events: pip install 'wastenot[viz]'"

    def write(self, **values: Any) -> None:
        """Writes one line; it is with the operating system when this returns, so a killed run loses none."""
        # JSON has no NaN: a loss that is not finite is null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        if self._board is not None and "step" in values:
            for name, value in scalars(values):
                if name != "step":
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Flushes to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._board is not None:
            self._board.close()


def scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number in `values` under a path of its own: `collectives/dispatch/bytes`, `slots/kept/1` of layer 1.

    Tables, such as the load of every expert, are left to metrics.jsonl.
    """
    for name, value in values.items():
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, Mapping):
            yield from ((f"{name}/{rest}", number) for rest, number in scalars(value))
        elif isinstance(value, list):
            yield from ((f"{name}/{i}", number) for i, number in enumerate(value) if isinstance(number, int | float))


def mend_last_line(path: Path) -> None:
    """Ends a line that a killed run left half-written, so that the next one starts on its own."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_metrics(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of a run's metrics.jsonl; a half-written one is passed over.

    A session that resumed at a step, as its first line says, does again what an earlier one did beyond it: only the
    later lines of those steps count.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return
    last: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        step, event = values.get("step"), values.get("event")
        if event == "start" and step is not None:
            last = {key: line for key, line in last.items() if (key[0] or 0) <= step}
        key = (step, event, "val_loss" in values)
        last.pop(key, None)
        last[key] = values
    yield from sorted(last.values(), key=lambda values: values.get("step") or 0)


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
