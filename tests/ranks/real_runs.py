"""Whole training runs from the command line, as users start them; the fixture `made` writes their configurations."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wastenot.launch.metrics import read_metrics

TINY = {
    "model": {"d_model": 32, "layers": 2, "heads": 2, "moe": {"experts": 4, "d_expert": 32}},
    "router": {"top_k": 2, "capacity_factor": 1.0, "jitter": 0.05, "rectify": {"intra": True, "fill": True}},
    "parallel": {"expert": 2, "piece_bytes": 0},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 5},
    "data": {"tokenizer": "bytes", "seq_len": 32},
    "train": {"steps": 60, "batch": 8, "sample_tokens": 8, "eval_every": 11},
    "checkpoint": {"every": 4, "keep": 2},
    "log": {"every": 1, "tensorboard": False},
}

TRAIN = (sys.executable, "-m", "wastenot.tools.cli", "train")
"""`wastenot train`, which starts the ranks itself."""


def launch(*command: object) -> subprocess.Popen:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [str(part) for part in command]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)


def start(config: Path, *arguments: str) -> subprocess.Popen:
    return launch(*TRAIN, config, *arguments)


def finish(process: subprocess.Popen, expected: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expected, output
    return output


def log_dir(config: Path) -> Path:
    return config.parent / "log"


def losses(config: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step."""
    lines = read_metrics(log_dir(config))
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


def last_step(config: Path) -> int:
    return max(losses(config), default=0)


def summary(config: Path) -> dict:
    return json.loads((log_dir(config) / "summary.json").read_text())


def account(config: Path) -> dict:
    """The run's ledger without seconds, which differ from one run to the next."""
    found = json.loads((log_dir(config) / "ledger.json").read_text())
    for collective in found["collectives"].values():
        del collective["waited_seconds"], collective["hidden_seconds"]
    return {name: value for name, value in found.items() if "_seconds" not in name}


def assert_same_account(config: Path, other: Path) -> None:
    """Every total is equal; shares nearly so, since lines that cut the run elsewhere round elsewhere."""
    expected = account(other)
    expected["expert_load"] = [pytest.approx(layer, rel=1e-12) for layer in expected["expert_load"]]
    expected["load"] = pytest.approx(expected["load"], rel=1e-12)
    assert account(config) == expected


def ranks(process: subprocess.Popen) -> dict[int, int]:
    """Process ids of the ranks that the command `process` has started, by rank."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(text[5:]): int(pid) for text in environ if text.startswith(b"RANK=")}
    return found
