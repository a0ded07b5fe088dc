"""Whole runs through the command line: resumed ones equal uninterrupted ones, whatever stopped them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_runs import TRAIN, assert_same_account, finish, last_step, launch, log_dir, losses, ranks, start, summary

from wastenot.launch.metrics import read_metrics
from wastenot.moe.ledger import SLOTS

EXCHANGES = ("dispatch", "combine", "dispatch-gradient", "combine-gradient")


@pytest.fixture(scope="module")
def uninterrupted(made) -> Path:
    config = made()
    finish(start(config))
    return config


def test_a_run_leaves_everything_it_promises(uninterrupted):
    folder = log_dir(uninterrupted)
    assert list(losses(uninterrupted)) == list(range(1, 61))
    found = summary(uninterrupted)
    assert found["steps"] == 60
    assert found["val_bits_per_byte"] < 4.5, "four bits are what single letters of these words cost"
    assert {"val_loss", "order5_bits_per_byte", "tokens_per_second", "peak_memory_bytes"} <= found.keys()
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    assert (folder / "config.yaml").is_file()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    first = next(iter(read_metrics(folder)))
    assert first["world"] == 2


def test_the_ledger_accounts_for_every_choice_and_slot_of_every_rank_and_layer(uninterrupted):
    ledger = json.loads((log_dir(uninterrupted) / "ledger.json").read_text())
    assert (ledger["steps"], ledger["world"], ledger["tokens"]) == (60, 2, 60 * 8 * 32)
    tokens, experts, layers = 4 * 32, 4, 2
    for layer_of_rank in itertools.chain.from_iterable(ledger["slots_by_rank"]):
        count = dict(zip(SLOTS, layer_of_rank, strict=True))
        assert count["kept"] + count["rectified"] + count["dropped"] == 60 * tokens * 2
        assert count["kept"] + count["filled"] + count["padding"] == 60 * experts * (tokens * 2 // experts)
        assert count["rectified"] > 0
        assert count["filled"] > 0
        assert count["unserved"] == 0
    for name, totals in ledger["slots"].items():
        by_rank = [[rank[layer][SLOTS.index(name)] for rank in ledger["slots_by_rank"]] for layer in range(layers)]
        assert totals == [sum(ranks) for ranks in by_rank]
    # Forward and backward of every step and layer on both ranks; evaluation is not training.
    assert {ledger["collectives"][name]["calls"] for name in EXCHANGES} == {60 * layers * 2}
    assert ledger["sent_bytes"] == sum(collective["bytes"] for collective in ledger["collectives"].values())
    assert "dense-gradients" in ledger["collectives"]
    assert not [kind for kind, total in ledger["collectives"].items() if total["waited_seconds"] == 0]
    lines = [line for line in read_metrics(log_dir(uninterrupted)) if "loss" in line]
    assert ledger["sent_bytes"] == sum(line["sent_bytes"] for line in lines)
    assert summary(uninterrupted)["rectified_ratio"] == pytest.approx(
        sum(ledger["slots"]["rectified"]) / (60 * 2 * layers * tokens * 2)
    )


def test_training_learns(uninterrupted):
    curve = losses(uninterrupted)
    assert curve[60][0] < 0.8 * curve[1][0]


def kill(process: subprocess.Popen) -> None:
    """Kills the command; its ranks die with it."""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[Path, int], None]]:
    """`disk(folder, size)` makes `folder` a disk of so many bytes, or gives the one that is there that size."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mounted: list[Path] = []

    def mount(folder: Path, size: int) -> None:
        remount = ["-o", "remount"] if folder in mounted else []
        command = ["mount", "-t", "tmpfs", *remount, "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and not mounted:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        mounted.append(folder)

    yield mount
    for folder in dict.fromkeys(mounted):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(made, uninterrupted, disk):
    one = next((log_dir(uninterrupted) / "checkpoints").glob("step-*"))
    size = sum(file.stat().st_size for file in one.iterdir())
    config = made(checkpoint={"every": 20})
    checkpoints = log_dir(config) / "checkpoints"
    checkpoints.mkdir(parents=True)
    disk(checkpoints, int(1.5 * size))
    output = finish(start(config), expected=1)
    assert "checkpoint of step 40 was not written" in output
    assert "No space left on device" in output
    assert "Traceback" not in output
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000020"]
    disk(checkpoints, 10 * size)
    assert "at step 20" in finish(start(config))
    here = losses(config)
    assert here == {step: losses(uninterrupted)[step] for step in here}
    assert max(here) == 60


def test_a_slow_rank_is_named(made):
    config = made(train={"steps": 160, "eval_every": 0, "sample_tokens": 0}, log={"every": 80}, checkpoint={"every": 0})
    process = start(config)
    while last_step(config) < 80 and process.poll() is None:
        # The second rank gets a sixth of its time.
        slow = ranks(process).get(1)
        if slow is not None:
            os.kill(slow, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(slow, signal.SIGCONT)
        time.sleep(0.02)
    assert "rank 1 keeps the others waiting" in finish(process)
    lines = [line for line in read_metrics(log_dir(config)) if "loss" in line]
    assert lines[0]["slow_rank"] == 1


def test_terminated_run_saves_and_goes_on_bit_for_bit(made, uninterrupted):
    # Lines of several steps: one ends early where the run stops.
    config = made(checkpoint={"every": 0}, log={"every": 5})
    process = start(config)
    while last_step(config) < 7 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "stopped by request" in output
    assert 7 <= last_step(config) < 60
    assert "resumed from" in finish(start(config))
    here, there = losses(config), losses(uninterrupted)
    assert here == {step: there[step] for step in here}
    assert_same_account(config, uninterrupted)


def test_a_finished_run_keeps_its_summary_unless_it_goes_on(made):
    config = made(
        parallel={"expert": 1}, train={"steps": 6, "eval_every": 0, "sample_tokens": 0}, checkpoint={"every": 0}
    )
    alone = sys.executable, "-m", "wastenot.launch.train", config
    finish(launch(*alone))
    finish(launch(*alone))
    assert summary(config)["steps"] == 6
    process = launch(*alone, "-s", "train.steps=100000")
    while last_step(config) < 7 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "stopped by request" in finish(process)
    assert not (log_dir(config) / "summary.json").exists()


TERMINATED_WHILE_STARTING = """
import os, signal, sys
from unittest import mock
from wastenot.launch import train
from wastenot.launch.engines import checkpoints

# While the run is built; `patch` raises where there is nothing of that name.
with mock.patch.object(checkpoints, "Checkpointer", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM)):
    sys.exit(train.main([sys.argv[1], "-s", "parallel.expert=1"]))
"""


def test_a_run_that_is_terminated_before_its_first_step_ends_at_once(made):
    finish(launch(sys.executable, "-c", TERMINATED_WHILE_STARTING, made()), expected=-signal.SIGTERM)


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ({"expert": 1}, {"name": "adamw"}),
        ({"expert": 4}, {"name": "adamw"}),
        ({"expert": 4}, {"name": "adapprox", "adapprox": {"true_error": True}}),
        ({"expert": 2, "shard": 4}, {"name": "adapprox", "adapprox": {"true_error": True}}),
        ({"expert": 4, "shard": 2, "data": 2}, {"name": "adamw"}),
    ],
)
def test_run_resumes_under_another_layout(made, tmp_path, layout, optimizer):
    emulate = {"top_k": 2, "capacity_factor": 1.0, "emulate": {"sources": 4, "owners": 4}, "jitter": 0.0}
    options = {"router": emulate, "train": {"steps": 24}, "optimizer": optimizer | {"lr": 0.01}}
    whole, half = made(**options), made(**options, checkpoint={"every": 12})
    finish(start(whole))
    process = start(half)
    while not (log_dir(half) / "checkpoints" / "step-00000012").exists() and process.poll() is None:
        time.sleep(0.01)
    kill(process)
    for newer in list((log_dir(half) / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(newer)
    finish(start(half, *(word for axis, degree in layout.items() for word in ("-s", f"parallel.{axis}={degree}"))))
    there, here = losses(half), losses(whole)
    assert there.keys() == here.keys()
    for step in range(13, 25):
        assert there[step][0] == pytest.approx(here[step][0], rel=1e-5), step
    assert summary(half)["val_loss"] == pytest.approx(summary(whole)["val_loss"], rel=1e-5)
    kinds = json.loads((log_dir(half) / "ledger.json").read_text())["collectives"]
    assert ("dense-weights" in kinds) == ("shard" in layout)
    assert ("expert-weights" in kinds) == (layout.get("shard", 1) > layout["expert"])


def test_other_configuration_is_refused_in_a_used_folder(uninterrupted):
    output = finish(start(uninterrupted, "-s", "optimizer.lr=0.5"), expected=2)
    assert "optimizer.lr: 0.01 -> 0.5" in output
    assert "Traceback" not in output
    output = finish(start(uninterrupted, "-s", "checkpoint.resume=never"), expected=2)
    assert "already holds a run" in output


def test_diverging_run_stops_with_a_reason_and_keeps_its_checkpoint(made):
    config = made(
        train={"steps": 60, "nonfinite_limit": 3}, optimizer={"lr": 1e30, "clip_norm": 0}, checkpoint={"every": 1}
    )
    output = finish(start(config), expected=1)
    assert "3 steps in a row had a loss or gradient that is not finite" in output
    assert "Traceback" not in output
    assert list((log_dir(config) / "checkpoints").glob("step-*"))
    lines = [line for line in read_metrics(log_dir(config)) if "loss" in line]
    assert lines[-1]["skipped"] == 3


def test_json_prints_one_object(made):
    config = made(train={"steps": 2}, schedule={"warmup_steps": 1})
    process = subprocess.run(
        [*TRAIN, str(config), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["steps"] == 2


def test_profile_is_written_on_request(made):
    config = made(train={"steps": 6}, log={"every": 1, "profile": [3, 4]}, schedule={"warmup_steps": 1})
    finish(start(config))
    trace = json.loads((log_dir(config) / "profile" / "rank0.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    assert (log_dir(config) / "profile" / "rank1.json").is_file()
