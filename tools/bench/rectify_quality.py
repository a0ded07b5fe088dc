"""Benchmark `rectify-quality`: what rectification brings to held-out loss and accuracy, against vanilla and dropless.

Small models on the real corpus, as on 4 ranks, upcycled from a dense one (the published setting) and from scratch.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...launch.config import DataConfig
from ...launch.corpus import prepare
from ...launch.errors import UserError
from . import rectify_real
from .machine import end_with_parent
from .rectify_cells import VOCABULARY, Cell, check, finished, grid, run_cell
from .rectify_methods import METHODS
from .rectify_picture import draw_quality
from .report import Goal, Report, Row, at_least, environment

FOLDER = Path("runs/rectify-quality")
"""Where finished cells stay, below the current folder."""

PUBLISHED_GAIN = 0.047
"""Relative gain in accuracy of both rectifications over vanilla top-1 (arXiv 2402.12399, abstract)."""

HEADINGS = {
    "setting": "setting",
    "top_k": "k",
    "factor": "f",
    "method": "method",
    "loss": "loss",
    "loss_se": "±",
    "above_dense": "above dense",
    "gain": "below vanilla",
    "gain_se": "±",
    "accuracy": "accuracy",
    "accuracy_se": "±",
    "gain_equal_rows": "at equal rows",
    "gain_equal_rows_se": "±",
    "rows_per_choice": "rows",
    "dropped": "dropped",
    "unserved": "unserved",
    "padding": "padding",
}


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Runs what is not there yet, on all cores, and reports on all cells.

    Raises where a first step disagrees with its reference: nothing is reported then.
    """
    cells = grid(quick)
    corpus = prepare(DataConfig(tokenizer=f"bpe:{VOCABULARY}"), progress=False)
    routers = dict.fromkeys(replace(cell, setting="scratch", seed=0) for cell in cells if cell.setting != "dense")
    say(f"checking first steps of {len(routers)} routers against reference kernels")
    for cell in routers:
        check(cell, corpus)
    FOLDER.mkdir(parents=True, exist_ok=True)
    run_all(cells, corpus, say)
    rows = summarise([(cell, result) for cell in cells if (result := finished(cell, FOLDER)) is not None])
    reached = goals(rows)
    notes = [
        "4 emulated ranks; 4 layers, every second with 8 experts; constant learning rate; every figure the mean of 3 "
        "seeds (weights, data order, dense model) with its standard error, differences paired by seed",
        "rows: expert rows a static implementation computes per choice, padding and stand-ins included; at equal rows: "
        "every contender as far as it got with the fewest rows of its group",
        f"finished cells are kept in {FOLDER}; the same command goes on from there",
    ]
    if quick:
        notes.append(
            "quick: top-1 at f = 0.5, upcycled; left out are f = 1.0 and 1.5, top-2, from scratch, and real weights"
        )
    else:
        try:
            real_rows, real_goals = rectify_real.measure(FOLDER, say)
        except UserError as error:
            notes.append(f"left out, real weights: {error}")
        else:
            rows, reached = rows + real_rows, reached + real_goals
    return Report(
        name="rectify-quality",
        command=command,
        env=environment(["numpy"]),
        rows=rows,
        goals=reached,
        notes=notes,
        headings=HEADINGS,
    )


def draw(report: Report, path: Path) -> Path | None:
    """Pictures the gains of `report` as PNG; None where that cannot be."""
    return draw_quality(report.rows, path)


def run_all(cells: Sequence[Cell], corpus: Path, say: Callable[[str], None]) -> None:
    """Runs unfinished cells, one process per core; dense models first, upcycled ones start from them."""
    for wave in ([c for c in cells if c.setting == "dense"], [c for c in cells if c.setting != "dense"]):
        todo = [cell for cell in wave if finished(cell, FOLDER) is None]
        if len(todo) < len(wave):
            say(f"{len(wave) - len(todo)} of {len(wave)} cells are there already")
        if not todo:
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers(), mp_context=context, initializer=end_with_parent) as pool:
            futures = {pool.submit(run_cell, cell, FOLDER, corpus): cell for cell in todo}
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                result = finished(futures[future], FOLDER)
                assert result is not None
                say(f"{done} of {len(todo)}: {futures[future].name} loss {result['loss']:.4f}")


def workers() -> int:
    """Cells at a time: one per core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summarise(results: Sequence[tuple[Cell, dict[str, Any]]]) -> list[Row]:
    """One row per setting, top_k, factor and method; dropless stands in every group of its setting and top_k."""
    rows: list[Row] = []
    for group in _groups(results):
        runs = {
            method: {cell.seed: result for cell, result in results if _belongs(cell, group, method)}
            for method in METHODS
        }
        fewest = min((r["expert_rows"] for by_seed in runs.values() for r in by_seed.values()), default=0)
        for method, by_seed in runs.items():
            if by_seed:
                rows.append(_row(group, method, by_seed, runs["vanilla"], fewest))
    return rows


def _groups(results: Sequence[tuple[Cell, dict[str, Any]]]) -> Iterator[tuple[str, int, float]]:
    seen = dict.fromkeys((c.setting, c.top_k, c.factor) for c, _ in results if c.factor is not None)
    for setting, top_k, factor in seen:
        assert factor is not None
        yield setting, top_k, factor


def _belongs(cell: Cell, group: tuple[str, int, float], method: str) -> bool:
    setting, top_k, factor = group
    fits = cell.factor is None if method == "dropless" else cell.factor == factor
    return cell.setting == setting and cell.top_k == top_k and cell.method == method and fits


def _row(
    group: tuple[str, int, float],
    method: str,
    by_seed: dict[int, dict[str, Any]],
    vanilla: dict[int, dict[str, Any]],
    fewest: int,
) -> Row:
    setting, top_k, factor = group
    paired = [seed for seed in by_seed if seed in vanilla and method != "vanilla"]
    slots = [result["slots"] for result in by_seed.values()]
    choices = sum(s["kept"] + s["rectified"] + s["dropped"] for s in slots)
    places = sum(s["kept"] + s["filled"] + s["padding"] for s in slots)
    row: dict[str, Any] = {"setting": setting, "top_k": top_k, "factor": factor, "method": method}
    row |= _mean_and_error("loss", [r["loss"] for r in by_seed.values()])
    row |= _mean_and_error("accuracy", [r["accuracy"] for r in by_seed.values()])
    row |= _mean_and_error("gain", [vanilla[s]["loss"] - by_seed[s]["loss"] for s in paired])
    row |= _mean_and_error("accuracy_gain", [by_seed[s]["accuracy"] - vanilla[s]["accuracy"] for s in paired])
    for what, sign in (("loss", -1), ("accuracy", 1)):
        at = {s: (at_rows(by_seed[s], fewest, what), at_rows(vanilla[s], fewest, what)) for s in paired}
        name = "gain_equal_rows" if what == "loss" else "accuracy_gain_equal_rows"
        row |= _mean_and_error(name, [sign * (ours - theirs) for ours, theirs in at.values()])
    row["rows_per_choice"] = sum(r["expert_rows"] for r in by_seed.values()) / choices
    row["dropped"] = sum(s["dropped"] for s in slots) / choices
    row["unserved"] = sum(s["unserved"] for s in slots) / (choices / top_k)
    row["padding"] = sum(s["padding"] for s in slots) / places
    row["seeds"] = len(by_seed)
    return row


def _mean_and_error(name: str, values: list[float]) -> dict[str, float | None]:
    """Mean and its standard error; None where there is nothing to average."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: statistics.fmean(values) if values else None, f"{name}_se": error}


def at_rows(result: dict[str, Any], rows: float, what: str) -> float:
    """Held-out `what` when the experts had computed `rows` rows, between two points of the curve."""
    curve = result["curve"]
    for before, after in itertools.pairwise(curve):
        if after["expert_rows"] >= rows:
            part = (rows - before["expert_rows"]) / (after["expert_rows"] - before["expert_rows"])
            return before[what] + part * (after[what] - before[what])
    return curve[-1][what]


def goals(rows: Sequence[Row]) -> list[Goal]:
    """The paper's claims for top-1 at f = 0.5, in each setting, and the gain beside the published one."""
    found: list[Goal] = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        at = {r["method"]: r for r in rows if (r["setting"], r["top_k"], r["factor"]) == (setting, 1, 0.5)}
        if {"vanilla", "IR", "FR", "both"} <= at.keys():
            for name, what in (("steps", "gain"), ("expert rows", "gain_equal_rows")):
                for method in ("both", "IR"):
                    gain, error = at[method][what], at[method][f"{what}_se"]
                    metric = f"{setting}, top-1, f 0.5: {method} below vanilla at equal {name}, in standard errors"
                    found.append(at_least(metric, gain / error if error else None, 2))
            metric = f"{setting}, top-1, f 0.5: loss of IR below that of FR"
            found.append(at_least(metric, at["IR"]["gain"] - at["FR"]["gain"], 0))
        gains = {r["factor"]: r["gain"] for r in rows if (r["setting"], r["top_k"], r["method"]) == (setting, 1, "IR")}
        if len(gains) > 1:
            least, most = min(gains), max(gains)
            metric = f"{setting}, top-1: gain of IR at f {least:g} above that at f {most:g}"
            found.append(at_least(metric, gains[least] - gains[most], 0))
    for row in rows:
        if (row["setting"], row["top_k"], row["method"]) == ("upcycled", 1, "both"):
            relative = row["accuracy_gain"] / (row["accuracy"] - row["accuracy_gain"])
            metric = f"upcycled, top-1, f {row['factor']:g}: relative gain in accuracy (published: {PUBLISHED_GAIN})"
            found.append(Goal(metric=metric, value=relative, goal="reported", met=True))
    return found
