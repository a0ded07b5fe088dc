"""Which part of the choices each expert gets, from lines of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .runs import Line, Run


def load_lines(run: Run) -> list[Line]:
    """The lines of `run` that tell every expert's share, all of the shape of the last."""
    lines = [line for line in run.lines if _shape(line.get("expert_load")) is not None]
    return [line for line in lines if _shape(line["expert_load"]) == _shape(lines[-1]["expert_load"])]


def mean_load(lines: Sequence[Line]) -> list[list[float]]:
    """Share of each expert [layers][experts], mean over `lines` (at least one)."""
    layers = zip(*(line["expert_load"] for line in lines), strict=True)
    return [[sum(shares) / len(lines) for shares in zip(*layer, strict=True)] for layer in layers]


def _shape(load: Any) -> tuple[int, int] | None:
    if not isinstance(load, list) or not load or not load[0] or any(len(layer) != len(load[0]) for layer in load):
        return None
    return len(load), len(load[0])
