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


@pytest.fixture
def folder(tmp_path) -> Path:
    """Holds `tiny.yaml`, the configuration of a run of four steps on two ranks."""
    draw = random.Random(0)
    folder = tmp_path
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


def test_the_scripts_for_torchrun_and_mpirun_train_alike(folder):
    pytest.importorskip("mpi4py", reason="needs the extra `mpi`", exc_type=ImportError)
    if not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("needs the extra `mpi`: no mpirun beside this Python")
    by_torchrun = losses(folder, "torchrun", "launch", "torchrun", "tiny.yaml", "--nodes", "1", "--submit")
    by_mpirun = losses(folder, "mpi", "launch", "mpi", "tiny.yaml", "--nodes", "1", "--submit")
    assert by_torchrun == by_mpirun
    assert len(by_torchrun) >= 4


def test_another_mpi_than_the_script_is_for_is_named(folder):
    tool = Path(sys.executable).with_name("mpiexec")
    if not tool.exists():
        pytest.skip("needs the extra `mpi`: no mpiexec beside this Python")
    said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    flavour, other = ("mpich", "openmpi") if "Open MPI" in said else ("openmpi", "")
    command = ["launch", "mpi", "tiny.yaml", "--nodes", "1", "--flavour", flavour, "--submit"]
    words = [sys.executable, "-m", "wastenot.tools.cli", *command]
    run = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: --flavour: {flavour}, but ") and f" is of {other}" in line
    assert not (folder / "runs").exists()
