"""What `wastenot profile` prints: figures beside those that were assumed, or one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ...parallel.lynx.calibration import VERSION, Calibration
from .job import Job


def show(calibration: Calibration, job: Job) -> None:
    """To stdout."""
    if job.as_json:
        json.dump(
            {"file": str(job.output), "version": VERSION, "command": job.command, **asdict(calibration)}, sys.stdout
        )
        print()
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{calibration.machine}; {calibration.date}", markup=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("measured", f"assumed for {job.cluster.name}"):
        table.add_column(column, justify="right")
    for name, measured, assumed in _figures(calibration, job):
        table.add_row(name, measured, assumed)
    console.print(table)
    for kind, times in calibration.layers.items():
        longest = sorted(times.seconds.items(), key=lambda pair: -pair[1])[:5]
        whole = sum(times.seconds.values())
        shown = ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in longest)
        console.print(f"a {kind} layer: {whole * 1e3:.3g} ms, most of it in {shown} ms", markup=False)
    for note in calibration.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"{job.output}; now: {job.command}", markup=False)


def _figures(calibration: Calibration, job: Job) -> Iterator[tuple[str, str, str]]:
    cluster = job.cluster
    for dtype, peak in calibration.peak.items():
        yield f"peak {dtype}", _flops(peak), _flops(cluster.device.peak[dtype]) if dtype in cluster.device.peak else ""
    device = calibration.device
    yield "memory bandwidth", _speed(device["bandwidth"]), _speed(cluster.device.bandwidth)
    yield "launch", _time(device["launch"]), _time(cluster.device.launch)
    for name, part in calibration.efficiency.items():
        yield f"efficiency of {name.replace('_', ' ')}", f"{part:.2f}", f"{getattr(cluster.efficiency, name):.2f}"
    for link in cluster.links:
        for name, value in calibration.links.get(link.name, {}).items():
            written = {"latency": _time, "bandwidth": _speed}.get(name, lambda part: f"{part:.2f}")
            yield f"{link.name}: {name.replace('_', ' ')}", written(value), written(getattr(link, name))


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def _speed(rate: float) -> str:
    return f"{rate / 1e12:.3g} TB/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GB/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"
