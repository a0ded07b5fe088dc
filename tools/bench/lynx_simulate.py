"""Benchmark `lynx-simulate`: predictions beside published figures, and the time and memory of a simulation by devices.

Nothing is fitted: the cluster's figures are datasheets' and assumptions made before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...parallel.lynx.assess import assess
from ...parallel.lynx.cluster import read_cluster
from ...parallel.lynx.layout import Layout
from ...parallel.lynx.question import Question
from ...parallel.lynx.solution import InfeasibleError
from ..lynx_input import read_model
from .panels import draw_panels
from .report import Goal, Report, Row, at_most, environment

DEVICES, QUICK_DEVICES = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072), (1024, 16384, 131072)
LARGE = 16384
MOST_S, MOST_BYTES = 10.0, 2 * 2**30
"""Of the command at LARGE devices, from its start to its end."""

HEADINGS = {
    "case": "case",
    "devices": "devices",
    "published": "published tokens/s/device",
    "predicted": "predicted",
    "error": "error",
    "seconds": "command, s",
    "peak_mb": "MB at most",
    "source": "source",
    "why_not": "why not",
}
NOTES = (
    "published figures are of forced balanced routing; layouts that the source does not give are ours",
    "command: `wastenot simulate deepseek-v3 --pipeline 16 --expert 64 --devices N --json`, a process of its own",
)


@dataclass(frozen=True)
class Published:
    """A training run that somebody measured."""

    case: str
    model: str
    layout: Layout
    tokens_per_second: float
    """Of a device."""
    source: str


PUBLISHED = (
    Published(
        "Qwen3-30B-A3B, 8 H100, bf16", "qwen3-30b-a3b",
        Layout(expert=8, data=8, micro_batches=8, zero=3), 12040, "NeMo Automodel",
    ),
    Published(
        "Qwen3-30B-A3B, 16 H100, fp8", "qwen3-30b-a3b",
        Layout(expert=16, data=16, micro_batches=32, zero=1, compute="fp8"), 8960, "Megatron Bridge",
    ),
    Published(
        "DeepSeek-V3, 256 H100, bf16", "deepseek-v3",
        Layout(expert=64, pipeline=4, data=64, micro_batches=32, zero=3, merged_dispatch=True), 1002, "NeMo Automodel",
    ),
    Published(
        "DeepSeek-V3, 1024 H100, bf16", "deepseek-v3",
        Layout(expert=64, pipeline=8, data=128, micro_batches=32, zero=1, merged_dispatch=True), 865, "NeMo Automodel",
    ),
    Published(
        "DeepSeek-V3, 1024 H100, fp8", "deepseek-v3",
        Layout(expert=64, pipeline=16, data=64, micro_batches=128, zero=1, merged_dispatch=True, compute="fp8"),
        1297, "Megatron Bridge",
    ),
)  # fmt: skip


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Both tables."""
    rows: list[Row] = []
    for published in PUBLISHED:
        say(published.case)
        rows.append(beside(published))
    for devices in QUICK_DEVICES if quick else DEVICES:
        say(f"DeepSeek-V3 on {devices} devices")
        rows.append(measured(devices))
    notes = [*NOTES]
    if quick:
        notes.append(f"quick: {len(QUICK_DEVICES)} numbers of devices of {len(DEVICES)}")
    return Report(
        name="lynx-simulate",
        command=command,
        env=environment(["numpy", "scipy"]),
        rows=rows,
        goals=goals(rows),
        notes=notes,
        headings=HEADINGS,
    )


def beside(published: Published) -> Row:
    """The prediction for one published run."""
    given = read_model(published.model)
    question = Question(
        shape=given.shape,
        layout=published.layout,
        cluster=read_cluster("h100-nvlink8-ib"),
        optimizer=given.optimizer,
    )
    row: dict[str, Any] = {
        "case": published.case,
        "published": published.tokens_per_second,
        "source": published.source,
        "layout": f"{published.layout}",
    }
    try:
        answer = assess(question)
    except InfeasibleError as error:
        return {**row, "why_not": f"does not fit: {error.smallest / 2**30:.1f} GiB"}
    predicted = answer.tokens_per_second_per_device
    return {
        **row,
        "predicted": predicted,
        "error": predicted / published.tokens_per_second - 1,
        "mfu": answer.mfu,
        "peak_bytes": max(answer.peak_bytes),
        "waste": answer.waste,
    }


_CHILD = """
import json, resource, sys, time
start = time.perf_counter()
from wastenot.tools.cli import main
code = main(sys.argv[1:])
took = time.perf_counter() - start
print(json.dumps([code, took, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]), file=sys.stderr)
"""


def measured(devices: int) -> Row:
    """The command on so many devices, in a process of its own."""
    command = ["simulate", "deepseek-v3", "--pipeline", "16", "--expert", "64", "--devices", str(devices)]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *command, "--merged-dispatch", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    code, seconds, peak = json.loads(done.stderr.splitlines()[-1])
    row = {"case": "DeepSeek-V3, PP16 EP64", "devices": devices, "seconds": seconds, "peak_mb": peak / 1e6}
    if code:
        return {**row, "why_not": done.stderr.splitlines()[-2]}
    return {**row, "predicted": json.loads(done.stdout)["tokens_per_second_per_device"]}


def goals(rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """Time and memory at 16,384 devices."""
    [large] = [row for row in rows if row.get("devices") == LARGE]
    return [
        at_most(f"DeepSeek-V3 on {LARGE} devices: the command, s", large["seconds"], MOST_S),
        at_most(f"DeepSeek-V3 on {LARGE} devices: GiB", large["peak_mb"] * 1e6 / 2**30, MOST_BYTES / 2**30),
    ]


def draw(report: Report, path: Path) -> Path | None:
    """Pictures the command's time over devices."""
    points = [(row["devices"], row["seconds"]) for row in report.rows if row.get("devices")]

    def times(axes: Any) -> None:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, marker="o", color="#4477aa", label="wastenot simulate")
        axes.axhline(MOST_S, color="0.6", lw=0.8, ls="--", label="goal")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0)
        axes.set_xlabel("devices")

    return draw_panels(path, {"DeepSeek-V3, PP16 EP64": times}, "seconds", width=5.0)
