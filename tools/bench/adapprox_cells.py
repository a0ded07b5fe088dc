"""Cells of the `adapprox-quality` benchmark: one small model trained with one optimizer, in a process of its own.

A finished cell is a file, so a benchmark that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ...launch.config import DataConfig, LogConfig, LoopConfig, ScheduleConfig, TrainConfig
from ...launch.data import eval_windows
from ...launch.optimizer_config import AdapproxConfig, OptimizerConfig
from ...launch.optimizer_state import measure
from ...launch.run_folder import write_atomically
from ...launch.settings import as_mapping
from ...launch.shards import TokenShards
from ...moe.config import ModelConfig, MoEConfig, RouterConfig
from ...moe.decoder import Decoder, build_decoder
from ...parallel.mesh import single
from .kept_cells import kept, make_stepper, use_one_thread
from .machine import end_with_parent
from .rectify_cells import evaluate

Model = Literal["dense", "moe"]
DATA = DataConfig(seq_len=128)
"""The trainer's own corpus and tokenizer."""
DENSE = ModelConfig(vocab_size=2048, d_model=256, layers=4, heads=4, d_ff=1024, qk_norm="head", init_std=0.06, moe=None)
MODELS: Mapping[Model, ModelConfig] = {
    "dense": DENSE,
    "moe": replace(DENSE, d_ff=512, moe=MoEConfig(experts=8, d_expert=256, every=2)),
}
"""Of 5.2 and 6.0 million parameters; the matrices of the experts are as large as those of the attention."""

BATCH = 8
EVALUATE_EVERY, CURVE_WINDOWS = 40, 64
"""Steps between points of a curve, and held-out windows of each, spread over all."""

_BETA2 = 0.95
CONTENDERS: Mapping[str, OptimizerConfig] = {
    "adamw": OptimizerConfig(beta2=_BETA2),
    "adapprox": OptimizerConfig(name="adapprox", beta2=_BETA2),
    "adapprox-int8": OptimizerConfig(name="adapprox", beta2=_BETA2, adapprox=AdapproxConfig(momentum="int8")),
    "adapprox-none": OptimizerConfig(name="adapprox", beta2=_BETA2, adapprox=AdapproxConfig(momentum="none")),
    "adafactor": OptimizerConfig(name="adafactor"),
    "came": OptimizerConfig(name="came", beta2=_BETA2),
    "adamw8bit": OptimizerConfig(name="adamw8bit", beta2=_BETA2),
    "apollo": OptimizerConfig(name="apollo", beta2=_BETA2),
    "muon": OptimizerConfig(name="muon", beta2=_BETA2),
}
"""All with the trainer's betas (0.9, 0.95), with which AdamW is better than with 0.999 here; but for Adafactor, whose
decay is its own."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    model: Model
    contender: str
    lr: float
    """Peak of the cosine schedule over `steps`."""
    steps: int
    seed: int
    every_window: bool = True
    """Whether the last evaluation takes all held-out windows; else those of the curve."""

    @property
    def name(self) -> str:
        windows = "" if self.every_window else "-tuning"
        return f"{self.model}-{self.contender}-lr{self.lr:g}-steps{self.steps}-seed{self.seed}{windows}"

    @property
    def config(self) -> TrainConfig:
        """The run as the trainer would be told."""
        return TrainConfig(
            model=MODELS[self.model],
            router=RouterConfig(top_k=1),
            optimizer=replace(CONTENDERS[self.contender], lr=self.lr),
            schedule=ScheduleConfig(kind="cosine", warmup_steps=self.steps // 10),
            data=DATA,
            train=LoopConfig(steps=self.steps, batch=BATCH, seed=self.seed),
            log=LogConfig(dir="unused"),
        )


def recipe(cell: Cell) -> dict[str, Any]:
    """All settings that decide what `cell` comes to, as JSON holds them."""
    made_of = {
        "config": as_mapping(cell.config),
        "evaluate_every": EVALUATE_EVERY,
        "curve_windows": CURVE_WINDOWS,
        "every_window": cell.every_window,
        "torch": torch.__version__,
    }
    return json.loads(json.dumps(made_of))


def finished(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """What `cell` came to, if it was run with its recipe; otherwise it is to be run again."""
    return kept(folder / f"{cell.name}.json", recipe(cell))


def run_all(cells: Sequence[Cell], folder: Path, corpus: Path, workers: int, say: Callable[[str], None]) -> None:
    """Runs the unfinished ones of `cells`, `workers` at a time."""
    todo = [cell for cell in cells if finished(cell, folder) is None]
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} cells are there already")
    if not todo:
        return
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        futures = {pool.submit(run_cell, cell, folder, corpus): cell for cell in todo}
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            result = finished(futures[future], folder)
            assert result is not None
            loss = "diverged" if result["loss"] is None else f"loss {result['loss']:.4f}"
            say(f"{done} of {len(todo)}: {futures[future].name} {loss}, {result['seconds']:.0f} s")


def run_cell(cell: Cell, folder: Path, corpus: Path) -> None:
    """Trains and evaluates `cell` on one thread and writes what came of it to `folder`, in one step."""
    use_one_thread()
    config = cell.config
    model = build_decoder(config.model, config.router, single(), seed=cell.seed)
    with warnings.catch_warnings():
        # The report has the ranks.
        warnings.filterwarnings("ignore", message=".*factors of the largest rank", category=UserWarning)
        result = train(model, config, corpus, cell.every_window)
    write_atomically(folder / f"{cell.name}.json", json.dumps({"cell": asdict(cell), "recipe": recipe(cell), **result}))


def train(model: Decoder, config: TrainConfig, corpus: Path, every_window: bool) -> dict[str, Any]:
    """Trains `model`: its curve, its last loss (over every held-out window), and the optimizer's state, ranks and time.

    `loss` is None where a step was not finite; there the run ends.
    """
    held_out = eval_windows(TokenShards.open(corpus, "val"), config.data.seq_len)
    stride = max(1, len(held_out[0]) // CURVE_WINDOWS)
    stepper = make_stepper(model, config, corpus)
    curve: list[dict[str, float]] = []
    taken, ranks = [], []
    seconds = cpu_seconds = 0.0
    loss: float | None = None
    for step in range(config.train.steps + 1):
        if step % EVALUATE_EVERY == 0 or step == config.train.steps:
            loss, _ = evaluate(model, *(part[::stride][:CURVE_WINDOWS] for part in held_out))
            curve.append({"step": step, "loss": loss})
        if step == config.train.steps:
            if every_window:
                loss, _ = evaluate(model, *held_out)
            break
        start, cpu_start = time.perf_counter(), time.process_time()
        result = stepper.step(step, step * BATCH, stop=False)
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
        if not result.applied:
            loss = None
            break
        state = measure(stepper.optimizer)
        taken.append(state.num_bytes)
        ranks += [state.ranks / state.matrices] if state.matrices else []
    numbers = sum(p.numel() for p in model.parameters())
    return {
        "loss": loss if loss is not None and math.isfinite(loss) else None,
        "curve": [point for point in curve if math.isfinite(point["loss"])],
        "state_bytes_per_parameter": taken[-1] / numbers if taken else None,
        "mean_state_bytes_per_parameter": statistics.fmean(taken) / numbers if taken else None,
        "rank": ranks[-1] if ranks else None,
        "mean_rank": statistics.fmean(ranks) if ranks else None,
        "parameters": numbers,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }
