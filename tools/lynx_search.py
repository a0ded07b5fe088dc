"""`wastenot simulate --search`: runs the search and shows its front."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..launch.errors import UserError
from ..parallel.lynx.layout import Layout
from ..parallel.lynx.question import Question
from ..parallel.lynx.search import Found, Point, Space, degrees, search
from ..parallel.lynx.units import show_bytes

_SEQUENCES = 8
"""Of a step, for each device, where no global batch is asked for."""
_TOP = 20
"""Reasons that people see."""


def run_search(args: argparse.Namespace, question: Question) -> int:
    """Searches over `question`'s model on as many devices as its layout has; what was asked for stays fixed."""
    space = space_of(args, question)
    base = replace(question, layout=replace(Layout(seq_len=question.layout.seq_len), zero=question.layout.zero or 1))
    try:
        found = _with_progress(lambda say: search(base, space, say), quiet=args.json)
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.json:
        print(json.dumps(as_json(space, found), allow_nan=False))
    else:
        _show(space, found)
    return 0


def space_of(args: argparse.Namespace, question: Question) -> Space:
    """All combinations, but for what the arguments fix."""
    devices = question.layout.devices
    usual = Space(devices=devices, global_batch=args.global_batch or _SEQUENCES * devices)
    fixed: dict[str, Any] = {}
    for name in ("tensor", "expert", "pipeline", "micro_batch"):
        if getattr(args, name) is not None:
            fixed[name] = (getattr(args, name),)
    if args.schedule is not None:
        fixed["schedules"] = (args.schedule,)
    if args.solver is not None:
        fixed["solvers"] = (args.solver,)
    if args.capacity_factor is not None:
        fixed["capacity_factors"] = (args.capacity_factor,)
    return replace(usual, **fixed)


def _with_progress(work: Callable[[Callable[[int, int], None]], Found], *, quiet: bool) -> Found:
    if quiet:
        return work(lambda done, of: None)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("search", total=None)
        return work(lambda done, of: progress.update(task, completed=done, total=of))


def as_json(space: Space, found: Found) -> dict[str, Any]:
    """With the keys that docs/lynx.md has."""
    return {
        "devices": space.devices,
        "global_batch": space.global_batch,
        "front": [_row(point) for point in found.front],
        "planned": found.planned,
        "bounded": found.bounded,
        "refused": dict(found.refused.most_common()),
    }


def _row(point: Point) -> dict[str, Any]:
    question, layout = point.question, point.question.layout
    return {
        "tensor": layout.tensor,
        "expert": layout.expert,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "chunks": layout.chunks,
        "micro_batch": layout.micro_batch,
        "micro_batches": layout.micro_batches,
        "schedule": question.schedule,
        "solver": question.solver,
        "capacity_factor": layout.capacity_factor,
        "optimizer": question.optimizer.name,
        "tokens_per_second_per_device": point.tokens_per_second_per_device,
        "mfu": point.mfu,
        "step_seconds": point.step_seconds,
        "peak_bytes": point.peak_bytes,
    }


def _show(space: Space, found: Found) -> None:
    console = Console()
    table = Table(title=f"{space.devices} devices, {space.global_batch} sequences a step: nothing is faster with less")
    for heading in ("layout", "schedule", "micro-batch", "policy", "tokens/s/device", "MFU", "step s", "peak"):
        table.add_column(heading, justify="left" if heading in ("layout", "schedule", "policy") else "right")
    for point in found.front:
        question = point.question
        table.add_row(
            degrees(question.layout), question.schedule,
            f"{question.layout.micro_batch} x {question.layout.micro_batches}", question.solver,
            f"{point.tokens_per_second_per_device:,.0f}", f"{100 * point.mfu:.1f} %", f"{point.step_seconds:.3f}",
            show_bytes(point.peak_bytes),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{found.planned} candidates were planned; {found.bounded} more cannot be better than one of those",
        highlight=False,
    )
    for why, many in found.refused.most_common(_TOP):
        console.print(f"{many} left out: {why}", markup=False, highlight=False)
