"""Benchmark `adapprox-quality`: held-out loss with Adapprox against AdamW and its peers, over the bytes of their state.

Small models, dense and with experts, on the corpus that the trainer uses; equal steps, a learning rate tuned for each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...launch.corpus import prepare
from ...launch.optimizer_config import what_is_missing
from .adapprox_cells import CONTENDERS, DATA, MODELS, Cell, Model, finished, run_all
from .adapprox_check import check
from .adapprox_picture import draw_quality
from .rectify_quality import workers
from .report import Goal, Report, Row, at_most, environment

FOLDER = Path("runs/adapprox-quality")
"""Where finished cells stay, below the current folder."""

LEARNING_RATES = (3e-4, 8e-4, 2e-3, 5e-3, 1.2e-2, 3e-2)
"""From CAME's to Adafactor's, which counts in units of a parameter's size."""
SEEDS, TUNING_SEED = (0, 1, 2), 3
"""Of weights and data order; learning rates are chosen on another one."""
STEPS, QUICK_STEPS = 400, 80
QUICK_CONTENDERS = ("adamw", "adapprox", "adafactor")

AIMS = {"adapprox": 0.55, "adapprox-int8": 0.20, "adapprox-none": 0.10}
"""Average state over a run, as a part of AdamW's, that the project aims at."""

Results = Mapping[Cell, Mapping[str, Any]]

HEADINGS = {
    "model": "model",
    "contender": "optimizer",
    "lr": "learning rate",
    "loss": "loss",
    "loss_se": "±",
    "above_adamw": "above AdamW",
    "above_adamw_se": "±",
    "mean_state_bytes_per_parameter": "bytes/parameter",
    "state_bytes_per_parameter": "at the end",
    "of_adamw": "of AdamW's",
    "mean_rank": "mean rank",
    "rank": "at the end",
    "seconds_per_step": "s/step",
    "why_not": "why not",
}


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Runs what is not there yet, on all cores, and reports on all cells; raises where Adapprox's steps are wrong."""
    check()
    corpus = prepare(DATA, progress=False)
    missing = {name: why for name in contenders(quick) if (why := what_is_missing(CONTENDERS[name].name))}
    present = [name for name in contenders(quick) if name not in missing]
    models: tuple[Model, ...] = ("dense",) if quick else tuple(MODELS)
    steps = QUICK_STEPS if quick else STEPS
    tuning = [
        Cell(model, name, lr, steps // 4, TUNING_SEED, every_window=False)
        for model in models
        for name in present
        for lr in LEARNING_RATES
    ]
    run_all(tuning, FOLDER, corpus, workers(), say)
    tuned = results_of(tuning)
    final = [
        Cell(model, name, best_rate(tuned, model, name), steps, seed)
        for model in models
        for seed in SEEDS
        for name in present
    ]
    run_all(final, FOLDER, corpus, workers(), say)
    rows = summarise(results_of(final), tuned)
    rows += [{"model": model, "contender": name, "why_not": why} for model in models for name, why in missing.items()]
    notes = [
        f"{steps} steps of 1024 tokens with a cosine schedule; learning rates chosen among "
        f"{', '.join(f'{lr:g}' for lr in LEARNING_RATES)} by runs of {steps // 4} steps on a seed of their own",
        "every figure is the mean of 3 seeds (weights, data order) with its standard error, differences paired by seed",
        "bytes/parameter: all tensors of the optimizer's state, averaged over the steps; s/step: of processor time, of "
        "all that a step does, one thread",
        "torch's Muon and APOLLO take hidden matrices only: all else, the experts too, has AdamW's state",
        f"finished cells are kept in {FOLDER}; the same command goes on from there. They know nothing of later "
        "changes to the optimizers' code: after such, remove their files",
    ]
    edge = [f"{row['model']} {row['contender']}" for row in rows if row.get("lr_at_edge")]
    if edge:
        notes.append(f"the best learning rate is the lowest or highest that was tried: {', '.join(edge)}")
    if quick:
        left_out = [name for name in CONTENDERS if name not in contenders(True)]
        notes.append(f"quick: {steps} steps instead of {STEPS}; left out are the MoE and {', '.join(left_out)}")
    return Report(
        name="adapprox-quality",
        command=command,
        env=environment(["numpy", "torchao", "came-pytorch", "apollo-torch"]),
        rows=rows,
        goals=goals(rows),
        notes=notes,
        headings=HEADINGS,
    )


def draw(report: Report, path: Path) -> Path | None:
    """Pictures loss over state bytes of `report` as PNG; None where that cannot be."""
    return draw_quality(report.rows, path)


def contenders(quick: bool) -> tuple[str, ...]:
    """Names of those that run, whether or not they are installed."""
    return QUICK_CONTENDERS if quick else tuple(CONTENDERS)


def results_of(cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """Those that are finished."""
    return {cell: result for cell in cells if (result := finished(cell, FOLDER)) is not None}


def best_rate(tuned: Results, model: str, contender: str) -> float:
    """The learning rate of the lowest loss; the lowest rate where all diverged."""
    return min(sorted(losses := _tuning(tuned, model, contender)), key=lambda lr: _or_infinity(losses[lr]))


def _tuning(tuned: Results, model: str, contender: str) -> dict[float, float | None]:
    return {c.lr: result["loss"] for c, result in tuned.items() if (c.model, c.contender) == (model, contender)}


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss


def summarise(results: Results, tuned: Results) -> list[Row]:
    """One row per model and contender; of runs that diverged nothing is averaged."""
    rows: list[Row] = []
    for model, contender in dict.fromkeys((cell.model, cell.contender) for cell in results):
        by_seed = _by_seed(results, model, contender)
        adamw = _by_seed(results, model, "adamw")
        rates = _tuning(tuned, model, contender)
        lr = next(cell.lr for cell in results if (cell.model, cell.contender) == (model, contender))
        row: dict[str, Any] = {"model": model, "contender": contender, "lr": lr}
        row["lr_at_edge"] = lr in (min(rates), max(rates)) if rates else None
        row["tuning"] = [{"lr": rate, "loss": loss} for rate, loss in rates.items()]
        row["losses"] = {seed: result["loss"] for seed, result in by_seed.items()}
        row["curves"] = {seed: result["curve"] for seed, result in by_seed.items()}
        ended = {seed: result["loss"] for seed, result in by_seed.items() if result["loss"] is not None}
        row["diverged"] = len(by_seed) - len(ended)
        row |= _mean_and_error("loss", list(ended.values()))
        paired = [seed for seed in ended if contender != "adamw" and adamw.get(seed, {}).get("loss") is not None]
        row |= _mean_and_error("above_adamw", [ended[seed] - adamw[seed]["loss"] for seed in paired])
        for name in ("state_bytes_per_parameter", "mean_state_bytes_per_parameter", "rank", "mean_rank"):
            row[name] = _mean([result[name] for result in by_seed.values()])
        theirs = _mean([result["mean_state_bytes_per_parameter"] for result in adamw.values()])
        ours = row["mean_state_bytes_per_parameter"]
        row["of_adamw"] = ours / theirs if ours is not None and theirs else None
        row["seconds"] = _mean([result["seconds"] for result in by_seed.values()])
        row["cpu_seconds"] = _mean([result["cpu_seconds"] for result in by_seed.values()])
        steps = next(cell.steps for cell in results)
        row["seconds_per_step"] = row["cpu_seconds"] / steps if row["cpu_seconds"] and not row["diverged"] else None
        row["why_not"] = f"{row['diverged']} of {len(by_seed)} diverged" if row["diverged"] else None
        rows.append(row)
    return rows


def _by_seed(results: Results, model: str, contender: str) -> dict[int, Mapping[str, Any]]:
    return {c.seed: result for c, result in results.items() if (c.model, c.contender) == (model, contender)}


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def _mean_and_error(name: str, values: list[float]) -> dict[str, float | None]:
    """Mean and its standard error; None where there is nothing to average."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: _mean(values), f"{name}_se": error}


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Adapprox no worse than AdamW beyond one standard error, and the aims for its state."""
    found: list[Goal] = []
    for row in rows:
        model, name = row["model"], row["contender"]
        if name == "adapprox":
            above, error = row["above_adamw"], row["above_adamw_se"]
            met = above is not None and error is not None and not row["diverged"] and above <= error
            bound = "<= 1 standard error" + (f" ({error:.4f})" if error is not None else "")
            found.append(
                Goal(metric=f"{model}: loss of adapprox above AdamW's, nats", value=above, goal=bound, met=met)
            )
        if name in AIMS and "of_adamw" in row:
            metric = f"{model}: state of {name} over the run / AdamW's"
            found.append(at_most(metric, row["of_adamw"], AIMS[name]))
    return found
