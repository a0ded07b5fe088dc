"""The picture of a run can be drawn whatever the run came to; no warning, a PNG, nothing left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from wastenot.launch.picture import draw

NGRAM = {"1": 3.6, "3": 2.4, "5": 2.1}
LOAD = [[0.5, 0.5], [0.9, 0.1]]


def step(number: int, **more: object) -> dict:
    return {"step": number, "loss": 5.0 / number, **more}


def held_out(number: int, bits: float) -> dict:
    return {"step": number, "val_loss": 2 * bits, "val_bits_per_byte": bits}


RUNS = {
    "one step": [step(1)],
    "one step with experts": [step(1, expert_load=LOAD), held_out(1, 8.0)],
    "worse than all n-grams": [step(1, expert_load=LOAD), step(2, expert_load=LOAD), held_out(2, 3.8)],
    "dense": [step(1), step(2), held_out(2, 2.0)],
    "a loss that was not finite": [step(1), {"step": 2, "loss": None}, step(3), held_out(3, 2.2)],
    "many": [step(i, expert_load=LOAD) for i in range(1, 300)] + [held_out(299, 1.9)],
}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_picture(name, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    path = draw(tmp_path / "report.png", RUNS[name], NGRAM)
    assert path == tmp_path / "report.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [Path(path)]


def test_nothing_logged_gives_no_picture(tmp_path):
    assert draw(tmp_path / "report.png", [], NGRAM) is None
