"""Benchmark `rectify-quality`: cells train, are kept and taken up again; figures are what they say."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from wastenot.launch.config import DataConfig
from wastenot.launch.corpus import prepare_files
from wastenot.tools.bench import rectify_cells, rectify_quality
from wastenot.tools.bench.rectify_cells import Cell, check, finished, grid, recipe, run_cell
from wastenot.tools.bench.rectify_picture import draw_quality, draw_speed
from wastenot.tools.bench.rectify_quality import at_rows, goals, summarise

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cells_train_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(rectify_cells.DENSE, d_model=32, layers=2, heads=2, d_ff=32)
    monkeypatch.setattr(rectify_cells, "DENSE", small)
    monkeypatch.setattr(rectify_cells, "STEPS", dict.fromkeys(rectify_cells.STEPS, 20))
    (tmp_path / "text.txt").write_text("".join(f"{i} green bottles hanging on the wall.\n" for i in range(4000)))
    data = DataConfig(dir=str(tmp_path / "data"), tokenizer="bytes", val_fraction=0.15)
    corpus = prepare_files([tmp_path / "text.txt"], data, progress=False)
    cells = [Cell("dense", 0), Cell("upcycled", 0, 1, "both", 0.5), Cell("scratch", 0, 2, "dropless")]
    for cell in cells:
        check(cell, corpus)
        assert finished(cell, tmp_path) is None
        run_cell(cell, tmp_path, corpus)
    dense, both, dropless = (finished(cell, tmp_path) for cell in cells)
    assert dense is not None and both is not None and dropless is not None
    assert [point["step"] for point in both["curve"]] == [0, 20]
    # Upcycled and rectified, the model starts as the dense one ended, half its choices lost or not.
    assert both["curve"][0]["loss"] == pytest.approx(dense["curve"][-1]["loss"], rel=1e-5)
    assert both["curve"][1]["loss"] < both["curve"][0]["loss"]
    assert 0 < both["accuracy"] < 1
    assert both["slots"]["rectified"] > 0 == both["slots"]["unserved"]
    tokens = rectify_cells.BATCH * rectify_cells.SEQ_LEN * 20
    slots = both["slots"]
    assert slots["kept"] + slots["rectified"] + slots["dropped"] == tokens
    assert both["expert_rows"] == slots["kept"] + slots["filled"] + slots["padding"] + slots["local_rows"]
    assert dropless["expert_rows"] == 2 * tokens
    # A cell of another recipe is run again.
    monkeypatch.setitem(rectify_cells.LEARNING_RATE, "dense", 1.0)
    assert [finished(cell, tmp_path) is None for cell in cells] == [True, True, False], "upcycled from the first"


def test_the_grid_has_every_contender_once_and_quick_is_a_part_of_it() -> None:
    full, quick = grid(quick=False), grid(quick=True)
    assert len(set(full)) == len(full) == 3 + 3 * 2 * 2 * (4 * 3 + 1)
    assert set(quick) < set(full)
    assert {cell.factor for cell in quick} == {None, 0.5}
    assert len({cell.name for cell in full}) == len(full)
    for cell in full:
        assert cell.config.router.rectify.intra == (cell.method in ("IR", "both"))
        assert cell.config.router.rectify.fill == (cell.method in ("FR", "both"))


def result(loss: float, accuracy: float, rows: int) -> dict:
    slots = {"kept": 60, "filled": 0, "rectified": 0, "dropped": 40, "padding": 10, "local_rows": 0, "unserved": 40}
    curve = [
        {"step": 0, "expert_rows": 0, "loss": 5.0, "accuracy": 0.0},
        {"step": 10, "expert_rows": rows, "loss": loss, "accuracy": accuracy},
    ]
    return {"loss": loss, "accuracy": accuracy, "expert_rows": rows, "slots": slots, "curve": curve}


def test_rows_of_the_table_by_hand() -> None:
    results = []
    for seed, offset in enumerate((0.0, 0.2, 0.7)):
        results.append((Cell("upcycled", seed, 1, "vanilla", 0.5), result(4.0 + offset, 0.2, 100)))
        results.append((Cell("upcycled", seed, 1, "IR", 0.5), result(3.9 + offset + 0.01 * seed, 0.22, 200)))
        results.append((Cell("upcycled", seed, 1, "FR", 0.5), result(3.95 + offset, 0.2, 100)))
        results.append((Cell("upcycled", seed, 1, "both", 0.5), result(3.8 + offset + 0.01 * seed, 0.22, 200)))
        results.append((Cell("upcycled", seed, 1), result(3.7 + offset, 0.25, 200)))
    rows = {row["method"]: row for row in summarise(results)}
    assert list(rows) == ["vanilla", "IR", "FR", "both", "dropless"]
    assert rows["vanilla"]["gain"] is None
    assert rows["vanilla"]["loss"] == pytest.approx(4.3)
    assert rows["IR"]["gain"] == pytest.approx(0.09)
    # Differences are paired by seed: the seeds' own spread does not enter.
    assert rows["IR"]["gain_se"] == pytest.approx(0.01 / 3**0.5)
    assert rows["IR"]["accuracy_gain"] == pytest.approx(0.02)
    # With 100 rows IR is half way down its curve.
    half_way = [(5.0 + 3.9 + offset + 0.01 * seed) / 2 for seed, offset in enumerate((0.0, 0.2, 0.7))]
    assert rows["IR"]["gain_equal_rows"] == pytest.approx(4.3 - sum(half_way) / 3)
    assert rows["IR"]["rows_per_choice"] == pytest.approx(2.0)
    assert rows["IR"]["padding"] == pytest.approx(10 / 70)
    met = {goal.metric: goal for goal in goals(list(rows.values()))}
    assert met["upcycled, top-1, f 0.5: IR below vanilla at equal steps, in standard errors"].met
    assert met["upcycled, top-1, f 0.5: both below vanilla at equal steps, in standard errors"].met
    assert met["upcycled, top-1, f 0.5: loss of IR below that of FR"].met
    assert not met["upcycled, top-1, f 0.5: both below vanilla at equal expert rows, in standard errors"].met


def test_figures_between_two_points_of_a_curve() -> None:
    run = result(4.0, 0.2, 100)
    assert at_rows(run, 50, "loss") == pytest.approx(4.5)
    assert at_rows(run, 100, "accuracy") == pytest.approx(0.2)
    assert at_rows(run, 1000, "loss") == 4.0
    for before, after in itertools.pairwise(at_rows(run, rows, "loss") for rows in range(0, 101, 10)):
        assert after < before


def test_an_unfinished_benchmark_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rectify_quality, "FOLDER", tmp_path)
    cell = Cell("dense", 0)
    (tmp_path / f"{cell.name}.json").write_text(json.dumps({"recipe": recipe(cell), **result(4.0, 0.2, 100)}))
    said: list[str] = []
    rectify_quality.run_all([cell], tmp_path, said.append)
    assert said == ["1 of 1 cells are there already"]


def test_pictures_are_drawn_of_any_rows(tmp_path: Path) -> None:
    quality = [
        {"setting": s, "top_k": 1, "factor": f, "method": m, "gain": 0.1, "gain_se": None}
        for s in ("upcycled", "scratch")
        for f in (0.5, 1.0)
        for m in ("IR", "both")
    ]
    speed = {"world": 2, "top_k": 1, "dispatch": "padded", "router": "skewed", "gini": 0.4, "method": "FR"}
    speed |= {"vs_vanilla": 1.02, "vs_vanilla_quartiles": [1.03, 1.05]}
    for draw, rows in ((draw_quality, quality), (draw_speed, [speed])):
        picture = draw(rows, tmp_path / "picture.png")
        assert picture is not None
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert draw([], tmp_path / "nothing.png") is None
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


ORPHANS = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from wastenot.tools.bench.machine import end_with_parent

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_workers_end_with_a_benchmark_that_was_killed(tmp_path: Path) -> None:
    """Left behind, they would go on with their cells, beside those of the next start."""
    (tmp_path / "orphans.py").write_text(ORPHANS)
    with subprocess.Popen([sys.executable, tmp_path / "orphans.py"], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        worker = int(started.stdout.readline())
        started.kill()
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").exists() and " Z " in Path(f"/proc/{worker}/stat").read_text():
            return  # ended, and not yet collected by whoever inherited it
        time.sleep(0.05)
    raise AssertionError("the worker lives on")
