"""A job on two nodes of a real Slurm: submitted, stopped as by the clock, queued again, it trains as torchrun does."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
from namespaces import UnavailableError
from real_runs import log_dir, losses, summary
from slurm_cluster import HEAD, Cluster

from wastenot.tools.cli import main

CLI = [sys.executable, "-m", "wastenot.tools.cli", "launch"]


@contextlib.contextmanager
def cluster_in(folder: Path) -> Iterator[Cluster]:
    """A cluster; skips the test where this machine cannot play one."""
    try:
        with slurm_cluster.slurm_cluster(folder) as started:
            yield started
    except UnavailableError as error:
        pytest.skip(str(error))


# First: while `cluster` is there, this process cannot have another.
def test_installed_daemons_that_do_not_come_up_are_no_reason_to_skip(tmp_path, monkeypatch):
    broken = tmp_path / "munged"
    broken.write_text("#!/bin/sh\necho this munged is broken\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm_cluster, "START_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match="Slurm does not start here: this munged is broken"), cluster_in(tmp_path):
        pass


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with cluster_in(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def on_head(cluster: Cluster, *words: str) -> subprocess.CompletedProcess:
    command = cluster.command(HEAD, shlex.join(words))
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def log_of(config: Path) -> str:
    return "".join(file.read_text() for file in config.parent.glob("wastenot-*.log"))


def await_job(cluster: Cluster, config: Path, there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not there():
        queued = on_head(cluster, "squeue", "--noheader").stdout
        assert (queued or there()) and time.monotonic() < deadline, queued + log_of(config)
        time.sleep(0.2)


def test_a_submitted_job_that_the_clock_stops_goes_on_and_ends_with_torchruns_losses(cluster, made, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    # A rank with a node to itself takes all its cores, and sums in more threads differ in the last bit.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    changes = {"train": {"steps": 150, "batch": 8, "eval_every": 0, "sample_tokens": 0}, "checkpoint": {"every": 0}}
    here, there = made(**changes), made(**changes)
    monkeypatch.chdir(there.parent)
    assert main(["launch", "torchrun", str(here), "--nodes", "1", "--submit"]) == 0
    expected = losses(here)
    assert list(expected) == list(range(1, 151))

    submitted = on_head(cluster, *CLI, "slurm", str(there), "--nodes", "2", "--submit")
    assert submitted.returncode == 0 and "Submitted batch job" in submitted.stdout, submitted.stderr
    await_job(cluster, there, lambda: (log_dir(there) / "metrics.jsonl").exists() and len(losses(there)) >= 3)
    # What --signal=TERM@120 does two minutes before the limit: to the ranks, not to the script.
    assert on_head(cluster, "scancel", "--name=wastenot", "--signal=TERM").returncode == 0
    await_job(cluster, there, (log_dir(there) / "summary.json").exists)
    assert log_of(there).count("stopped by request at step") == 1
    assert log_of(there).count("resumed from") == 1
    assert losses(there) == expected
    assert summary(there)["steps"] == 150


def test_what_slurm_refuses_is_one_line(cluster):
    command = [*CLI, "slurm", "quickstart", "--nodes", "2", "--submit", "--partition", "gpu"]
    refused = on_head(cluster, *command)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: --submit: sbatch refused the job: invalid partition specified: gpu; ")
    assert line.endswith("; --partition: this cluster has all")
