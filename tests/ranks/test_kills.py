"""Ranks of real runs are killed at random moments: those left say who and where, and no bit of the run changes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from real_runs import assert_same_account, finish, last_step, launch, log_dir, losses, ranks, start, summary

LAYOUTS = {
    "EP2": {"expert": 2},
    "FSDP2": {"expert": 1, "shard": 2},
    "TP2": {"expert": 1, "tensor": 2},
    "PP2": {"expert": 1, "pipeline": 2},
    "EP2xDP2": {"expert": 2, "data": 4},
}
# What a kill aims at: a rank in a step, while a checkpoint is written, before the first step; or the command itself.
LOCAL = {"EP2": ("step", "command"), "PP2": ("step",)}
TORCHRUN = {"FSDP2": ("write",)}
if os.environ.get("WASTENOT_GRID") == "full":
    LOCAL = dict.fromkeys(LAYOUTS, ("step", "write")) | {"EP2": ("step", "write", "start", "command")}
    TORCHRUN = dict.fromkeys(LAYOUTS, ("step", "start"))

LONGEST_SECONDS = 60
"""From a kill to the end of what was killed."""


@dataclass
class Whole:
    """A run that nobody interrupted."""

    config: Path
    world: int
    start_seconds: float
    """From its ranks to its first step."""


@pytest.fixture(scope="module")
def made_for(made) -> Callable[[str], Path]:
    """Writes a configuration of 24 steps under a layout into a fresh folder."""
    train = {"steps": 24, "batch": 8, "accumulate": 2, "eval_every": 0, "sample_tokens": 0}
    return lambda layout: made(parallel=LAYOUTS[layout], train=train)


@pytest.fixture(scope="module")
def whole(made_for) -> Callable[[str], Whole]:
    """The run under a layout, uninterrupted."""

    @cache
    def run(layout: str) -> Whole:
        config = made_for(layout)
        process = start(config)
        await_that(process, lambda: ranks(process))
        began = time.monotonic()
        await_that(process, lambda: starts(config))
        start_seconds = time.monotonic() - began
        finish(process)
        world = json.loads((log_dir(config) / "ledger.json").read_text())["world"]
        return Whole(config, world, start_seconds)

    return run


def await_that(process: subprocess.Popen, condition: Callable[[], object]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def starts(config: Path) -> list[int]:
    """Steps from which the sessions of the run have trained."""
    path = log_dir(config) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.startswith('{"event": "start"')]


def unfinished(config: Path) -> set[str]:
    """Checkpoints that are being written, or were when their writers died."""
    return {path.name for path in (log_dir(config) / "checkpoints").glob(".partial*")}


def newest(config: Path) -> int:
    """Step of the newest complete checkpoint, 0 without any."""
    return max((int(path.name[5:]) for path in (log_dir(config) / "checkpoints").glob("step-*")), default=0)


@dataclass
class Kill:
    """One kill -9."""

    victim: int
    phase: str
    """What it hit: `step`, `write` or `start`."""
    moment: float
    """Its time.monotonic()."""


def kill(process: subprocess.Popen, config: Path, aim: str, draw: random.Random, whole: Whole) -> Kill:
    """Kills a random rank of `process`, or `process`, at a random moment of what `aim` says.

    Steps and writes are hit only when this session has completed a checkpoint.
    """
    sessions, old, saved = len(starts(config)), unfinished(config), newest(config)
    await_that(process, lambda: len(ranks(process)) == whole.world)
    if aim == "start":
        deadline = time.monotonic() + draw.random() * whole.start_seconds
        await_that(process, lambda: time.monotonic() > deadline or len(starts(config)) > sessions)
    else:
        await_that(process, lambda: len(starts(config)) > sessions and newest(config) > saved)
        target = last_step(config) + draw.randint(1, 4)
        await_that(process, lambda: last_step(config) >= target if aim == "step" else unfinished(config) - old)
        time.sleep(draw.random() * (0.05 if aim == "step" else 0.005))
    victim = draw.randrange(whole.world)
    os.kill(process.pid if aim == "command" else ranks(process)[victim], signal.SIGKILL)
    moment = time.monotonic()
    phase = "start" if len(starts(config)) == sessions else "write" if unfinished(config) - old else "step"
    return Kill(victim, phase, moment)


def witnesses(kill: Kill, output: str) -> list[str]:
    """What ranks that were left say about it: where each was, and who is gone."""
    gone = f"rank {kill.victim} is dead or stopped"
    if kill.victim == 0:
        gone = f"(?:{gone}|the store in rank 0's process does not answer)"
    where = r"waited in collective \S+ #\d+ \(step \d+, \w+\)|was at step \d+, \w+, last collective \S+ #\d+"
    return re.findall(rf"^rank \d+ (?:{where}): {gone}.*", output, re.MULTILINE)


def assert_same_run(config: Path, whole: Whole) -> None:
    assert losses(config) == losses(whole.config)
    assert_same_account(config, whole.config)
    assert summary(config)["val_loss"] == summary(whole.config)["val_loss"]
    assert not unfinished(config), "leftovers of killed sessions"


@pytest.mark.parametrize("layout", LOCAL)
def test_a_killed_rank_ends_the_job_by_name_and_the_next_goes_on_bit_for_bit(made_for, whole, layout):
    config, expected, draw = made_for(layout), whole(layout), random.Random(layout)
    points = [0]
    for aim in LOCAL[layout]:
        process = start(config)
        found = kill(process, config, aim, draw, expected)
        output, _ = process.communicate(timeout=240)
        took = time.monotonic() - found.moment
        assert took < LONGEST_SECONDS
        points.append(newest(config))
        if aim == "command":
            assert found.phase == "write"
            continue
        assert process.returncode == 1, output
        assert f"rank {found.victim} of {expected.world} was killed by SIGKILL" in output
        assert found.phase == "start" or witnesses(found, output), output
    finish(start(config))
    assert set(starts(config)) <= set(points)
    assert starts(config)[-1] == points[-1] > 0
    assert_same_run(config, expected)


@pytest.mark.parametrize("layout", TORCHRUN)
def test_torchrun_starts_the_ranks_again_and_they_go_on_bit_for_bit(made_for, whole, layout):
    config, expected, draw = made_for(layout), whole(layout), random.Random(layout)
    options = ["--standalone", "--nproc-per-node", expected.world, "--max-restarts", len(TORCHRUN[layout])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, "--monitor-interval", 0.1]
    process = launch(*torchrun, "-m", "wastenot.launch.train", config)
    points, kills = [0], []
    for aim in TORCHRUN[layout]:
        await_that(process, lambda: len(ranks(process)) == expected.world)
        before = set(ranks(process).values())
        kills.append(kill(process, config, aim, draw, expected))
        await_that(process, lambda before=before: before.isdisjoint(ranks(process).values()))
        took = time.monotonic() - kills[-1].moment
        assert took < LONGEST_SECONDS
        points.append(newest(config))
    output = finish(process)
    assert not re.search("SIGABRT|SIGSEGV|malloc", output), output
    for found in kills:
        assert found.phase == "start" or witnesses(found, output), output
    assert set(starts(config)) <= set(points)
    assert starts(config)[-1] == points[-1]
    assert_same_run(config, expected)
