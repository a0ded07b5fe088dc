"""Benchmark `parity`: the real trainer gives the same losses and gradient norms at every layout of ranks.

Each run goes through the launch path that users take: local ranks, a YAML file, metrics.jsonl. All train the
same model on the same global batches, and are held against the run on one rank, step by step.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ...launch.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from ...launch.corpus import prepare_files
from ...launch.local import run_ranks
from ...launch.metrics import read_metrics
from ...launch.settings import dump_config
from ...moe.config import EmulateConfig, ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from ...parallel.config import ParallelConfig
from .report import Goal, Report, Row, at_most, environment

Precision = Literal["fp64", "fp32", "bf16"]

LAYOUTS = (
    ParallelConfig(data=1),
    ParallelConfig(data=2, expert=2),
    ParallelConfig(data=2),
    ParallelConfig(data=4, expert=2),
    ParallelConfig(data=4, expert=4),
    ParallelConfig(data=1, shard=2),
    ParallelConfig(data=2, shard=2),
    ParallelConfig(data=1, shard=4, expert=2),
    ParallelConfig(data=2, shard=2, expert=4),
    ParallelConfig(data=1, tensor=2),
    ParallelConfig(data=1, tensor=2, expert=2),
    ParallelConfig(data=2, tensor=2, expert=4),
    ParallelConfig(data=1, shard=2, tensor=2, expert=2),
    ParallelConfig(data=1, pipeline=2),
    ParallelConfig(data=2, pipeline=2, expert=2),
    ParallelConfig(data=1, pipeline=2, tensor=2, expert=2),
    ParallelConfig(data=1, pipeline=2, shard=2),
    ParallelConfig(data=1, pipeline=2, shard=2, expert=2),
)
"""The first is what the others are held against. Rows name them as `name_of` does."""

ACCUMULATE = 4
"""Micro-batches of a step: what fills a pipeline, and the same everywhere."""

STEPS = 30
BATCH, SEQ_LEN = 16, 64
# In fp32 the layouts' sums differ in the last bit, and sooner or later a token at the edge of a capacity, or two
# experts' tie, falls to the other side: a step of about 1e-5 in the loss, which fp64 shows to be rounding alone.
# At a usual learning rate 30 steps stay clear of it; at 1e-3 one run in three meets it.
LOSS_BOUND = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 5e-3}
NORM_BOUND = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference at any step."""

HEADINGS = {
    "mode": "mode",
    "precision": "type",
    "layout": "layout",
    "ranks": "ranks",
    "loss_difference": "loss",
    "grad_norm_difference": "norm",
    "bitwise": "bitwise",
    "dropped_ratio": "dropped",
}

# The widest world: emulated sources must be a multiple of every world compared (METHODS R10).
EMULATED = EmulateConfig(sources=4, owners=4)

ROUTERS = {
    "dropless": RouterConfig(balance_over="global"),
    "capacity": RouterConfig(capacity_factor=1.0, emulate=EMULATED),
    "capacity, padded": RouterConfig(capacity_factor=1.0, emulate=EMULATED),
    "rectified": RouterConfig(capacity_factor=1.0, emulate=EMULATED, rectify=RectifyConfig(intra=True, fill=True)),
}
"""Mode and its routing: losses over the global batch, or capacity and losses per emulated rank."""

PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "dropless": ("fp64", "fp32", "bf16"),
    "capacity": ("fp64", "fp32"),
    "capacity, padded": ("fp64", "fp32"),
    "rectified": ("fp64", "fp32", "bf16"),
}


@dataclass(frozen=True)
class Curve:
    """What one run said of its steps."""

    losses: list[float]
    norms: list[float]
    dropped: float
    """Largest part of the choices that were dropped in a step."""


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Trains at every layout, mode and precision. Raises RuntimeError where a run fails."""
    modes = [mode for mode in ROUTERS if not (quick and mode == "capacity, padded")]
    rows: list[Row] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory(prefix="wastenot-parity-") as folder:
        corpus = make_corpus(Path(folder))
        for mode in modes:
            for precision in PRECISIONS[mode]:
                curves = {}
                for layout in layouts(mode):
                    say(f"{mode}, {precision}: {name_of(layout)}")
                    where = Path(folder) / f"{mode}-{precision}-{name_of(layout)}".replace(", ", "-").replace(" ", "-")
                    curves[layout] = train(configure(mode, precision, layout, corpus, where))
                new_rows, new_goals = compare(mode, precision, curves)
                rows += new_rows
                goals += new_goals
    notes = [
        f"largest relative difference over {STEPS} steps to the run on 1 rank, same global batches",
        "EP experts over ranks (folded: the ranks are the product of the others), DP copies, FSDP shared storage, TP "
        "tensor-parallel ranks, PP pipeline stages",
        "fp32: over many more steps, or at a higher learning rate, rounding moves single tokens across the edge of a "
        "capacity, and the curves part by about 1e-5; fp64 runs the reference kernels; bf16 rounds every product, in "
        "another order under each layout",
    ]
    if quick:
        notes.append("quick: left out capacity mode with padded (static) splits")
    return Report(
        name="parity",
        command=command,
        env=environment(["numpy"]),
        rows=rows,
        goals=goals,
        notes=notes,
        headings=HEADINGS,
    )


AXES = {"expert": "EP", "pipeline": "PP", "tensor": "TP", "shard": "FSDP", "data": "DP"}


def layouts(mode: str) -> list[ParallelConfig]:
    """Those that may run it: emulated ranks, by which capacities are equal, are not cut by tensor parallelism. Padded
    splits are tried where rows travel."""
    return [
        layout
        for layout in LAYOUTS
        if (layout.tensor == 1 or ROUTERS[mode].emulate is None)
        and ("padded" not in mode or layout.expert > 1 or layout is LAYOUTS[0])
    ]


def name_of(layout: ParallelConfig) -> str:
    """The degrees above 1, say EP2xFSDP4; ranks are the product of all but EP, which is folded over them."""
    parts = [f"{short}{getattr(layout, axis)}" for axis, short in AXES.items() if getattr(layout, axis) != 1]
    return "x".join(parts) or "1 rank"


def configure(mode: str, precision: Precision, layout: ParallelConfig, corpus: Path, where: Path) -> TrainConfig:
    """A run of the tiny model at one layout; fp64 takes the reference kernels."""
    moe = MoEConfig(experts=8, d_expert=64, dispatch="padded" if "padded" in mode else "ragged")
    return TrainConfig(
        model=ModelConfig(d_model=64, layers=2, heads=4, kv_heads=2, moe=moe),
        router=ROUTERS[mode],
        parallel=layout,
        optimizer=OptimizerConfig(lr=3e-4),
        schedule=ScheduleConfig(warmup_steps=5),
        data=DataConfig(corpus=str(corpus), tokenizer="bytes", seq_len=SEQ_LEN, dir=str(where.parent)),
        train=LoopConfig(
            steps=STEPS, batch=BATCH, accumulate=ACCUMULATE, precision=precision, eval_batch=16, sample_tokens=0
        ),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(dir=str(where), every=1, tensorboard=False),
        kernels="reference" if precision == "fp64" else "auto",
    )


def make_corpus(folder: Path) -> Path:
    """A prepared corpus of made-up sentences: the same bytes on every machine."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(200)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    sentences = [" ".join(draw.choices(words, weights, k=draw.randint(4, 12))) + "." for _ in range(1200)]
    text = folder / "made-up.txt"
    text.write_text(" ".join(sentences), encoding="utf-8")
    return prepare_files([text], DataConfig(tokenizer="bytes", dir=str(folder)), progress=False)


def train(config: TrainConfig, module: str = "wastenot.launch.train") -> Curve:
    """Runs `config` on local ranks, each of them `module`.

    Raises RuntimeError, with what they printed last, unless all steps are there.
    """
    folder = Path(config.log.dir)
    file, output = folder.with_suffix(".yaml"), folder.with_suffix(".txt")
    file.write_text(dump_config(config), encoding="utf-8")
    with _output_in(output):
        code = run_ranks([str(file)], config.parallel.world(), module=module)
    lines = [line for line in read_metrics(folder) if "loss" in line] if code == 0 else []
    if [line["step"] for line in lines] != list(range(1, config.train.steps + 1)):
        raise RuntimeError(f"run {folder.name} ended with code {code}; it said:\n{output.read_text()[-4000:]}")
    return Curve(
        [line["loss"] for line in lines],
        [line["grad_norm"] for line in lines],
        max(line.get("dropped_ratio", 0.0) for line in lines),
    )


def compare(mode: str, precision: str, curves: dict[ParallelConfig, Curve]) -> tuple[list[Row], list[Goal]]:
    """Every layout against the first, and the two goals of this mode and precision."""
    alone = curves[LAYOUTS[0]]
    rows: list[Row] = []
    for layout, curve in curves.items():
        rows.append(
            {
                "mode": mode,
                "precision": precision,
                "layout": name_of(layout),
                "ranks": layout.world(),
                "loss_difference": largest_difference(curve.losses, alone.losses),
                "grad_norm_difference": largest_difference(curve.norms, alone.norms),
                "bitwise": curve.losses == alone.losses and curve.norms == alone.norms,
                "first_loss": curve.losses[0],
                "last_loss": curve.losses[-1],
                "dropped_ratio": curve.dropped,
            }
        )

    def worst(what: str) -> float:
        # numpy's maximum, unlike Python's, keeps a NaN.
        return float(np.max([row[what] for row in rows]))

    return rows, [
        at_most(f"{mode}, {precision}: loss", worst("loss_difference"), LOSS_BOUND[precision]),
        at_most(f"{mode}, {precision}: gradient norm", worst("grad_norm_difference"), NORM_BOUND[precision]),
    ]


def largest_difference(values: list[float], reference: list[float]) -> float:
    """Largest relative difference of two curves of the same length; NaN where one of them has NaN."""
    ours, theirs = np.array(values), np.array(reference)
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


@contextlib.contextmanager
def _output_in(path: Path) -> Iterator[None]:
    """Sends what this process and its children print to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
