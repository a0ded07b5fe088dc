"""The scripts of `wastenot launch` train, and give the same losses whoever starts the ranks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from wastenot.launch.metrics import read_metrics

WORDS = ["seven", "wizards", "brew", "dark", "tea", "while", "a", "fox", "jumps"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds `tiny.yaml`, the configuration of a run of four steps on two ranks."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("jobs")
    documents = [{"text": " ".join(draw.choice(WORDS) for _ in range(2000))} for _ in range(2)]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, documents)))
    settings = {
        "model": {"d_model": 32, "layers": 2, "heads": 2, "moe": {"experts": 4, "d_expert": 32}},
        "parallel": {"expert": 2, "piece_bytes": 0, "timeout_seconds": 60},
        "schedule": {"warmup_steps": 2},
        "data": {"corpus": "words.jsonl", "dir": "prepared", "tokenizer": "bytes", "seq_len": 32},
        "train": {"steps": 4, "batch": 8, "sample_tokens": 0},
        "log": {"every": 1, "tensorboard": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


def losses(folder: Path, name: str, *command: str) -> list[float]:
    """Losses of a run into log directory `name`."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "wastenot.tools.cli", *command, "-s", f"log.dir={name}"]
    run = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line["loss"] for line in read_metrics(folder / name) if "loss" in line]


@pytest.fixture(scope="module")
def expected(folder) -> list[float]:
    """Losses on the ranks that `wastenot train` starts itself."""
    found = losses(folder, "local", "train", "tiny.yaml")
    assert len(found) >= 4
    return found


def test_the_torchrun_script_trains_alike(folder, expected):
    assert losses(folder, "torchrun", "launch", "torchrun", "tiny.yaml", "--nodes", "1", "--submit") == expected


def test_the_mpirun_script_trains_alike(folder, expected):
    pytest.importorskip("mpi4py", reason="needs the extra `mpi`", exc_type=ImportError)
    if not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("needs the extra `mpi`: no mpirun beside this Python")
    assert losses(folder, "mpi", "launch", "mpi", "tiny.yaml", "--nodes", "1", "--submit") == expected
