"""Which part of the choices each expert gets, and how even that is, from lines of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...moe.load import FIGURES
from .runs import Line, Run


def load_lines(run: Run) -> list[Line]:
    """The lines of `run` that tell every expert's share, all of the shape of the last."""
    lines = [line for line in run.lines if _shape(line.get("expert_load")) is not None]
    return [line for line in lines if _shape(line["expert_load"]) == _shape(lines[-1]["expert_load"])]


def mean_load(lines: Sequence[Line]) -> list[list[float]]:
    """Share of each expert [layers][its experts], mean over `lines` (at least one)."""
    layers = zip(*(line["expert_load"] for line in lines), strict=True)
    return [[sum(shares) / len(lines) for shares in zip(*layer, strict=True)] for layer in layers]


def mean_figures(lines: Sequence[Line], layers: int) -> list[list[float]] | None:
    """`moe.load.FIGURES` of each of `layers` layers, mean over the steps of `lines`; None where a line has them not."""
    steps = [line.get("ledger_steps", 0) for line in lines]
    columns: list[list[float]] = []
    for name in FIGURES:
        tables = [line.get(f"expert_load_{name}_by_layer", []) for line in lines]
        if not sum(steps) or any(len(table) != layers for table in tables):
            return None
        weighted = ([s * value for value in table] for s, table in zip(steps, tables, strict=True))
        columns.append([sum(values) / sum(steps) for values in zip(*weighted, strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


def _shape(load: Any) -> tuple[int, ...] | None:
    """Experts of each layer."""
    return tuple(map(len, load)) if isinstance(load, list) and load and all(load) else None
