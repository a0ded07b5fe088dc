"""What a benchmark says: measurements and the goals they meet or miss, for machines and people."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = Mapping[str, Any]
"""One contender at one case; values are JSON-able, None where nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One bar that the benchmark stands for."""

    metric: str
    value: float | None
    """None where it could not be measured: then the goal is missed."""
    goal: str
    met: bool


def at_least(metric: str, value: float | None, bound: float) -> Goal:
    """The goal value >= bound."""
    return Goal(metric=metric, value=_finite(value), goal=f">= {bound:g}", met=value is not None and value >= bound)


def at_most(metric: str, value: float | None, bound: float) -> Goal:
    """The goal value <= bound."""
    return Goal(metric=metric, value=_finite(value), goal=f"<= {bound:g}", met=value is not None and value <= bound)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of one benchmark run."""

    name: str
    command: str
    """The command line that repeats it."""
    env: Mapping[str, Any]
    rows: list[Row]
    goals: list[Goal]
    notes: list[str] = field(default_factory=list)
    """What was left out, and what the numbers do not show."""
    headings: Mapping[str, str] = field(default_factory=dict)
    """Values of a row that people see, and what stands above them; the JSON object has all."""

    def to_json(self) -> str:
        """One JSON object; numbers that are not finite become null."""
        fields = _finite(asdict(self))
        del fields["headings"]
        return json.dumps(fields, indent=2, allow_nan=False, ensure_ascii=False)

    def write(self, path: Path) -> None:
        """Writes the JSON object to `path`, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """Prints tables for people: measurements, goals, notes."""
        console.print(_table(self.name, self.rows, self.headings))
        headings = {"metric": "goal", "goal": "bar", "value": "value", "met": "met"}
        console.print(_table("goals", [asdict(goal) for goal in self.goals], headings))
        for note in self.notes:
            console.print(f"note: {note}", markup=False, highlight=False)


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Versions, device and cores of this machine; `packages` are those whose versions matter beside torch."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("wastenot", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "device": f"cpu: {_processor()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _table(title: str, rows: list[Row], headings: Mapping[str, str]) -> Table:
    """`headings` in their order, but for those under which nothing stands."""
    table = Table(title=title, title_justify="left")
    columns = [key for key in headings if any(row.get(key) is not None for row in rows)]
    for key in columns:
        table.add_column(headings[key], overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3:
            return f"{value:.0e}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    # As it is written: brackets are markup to rich.
    return escape(str(value))
