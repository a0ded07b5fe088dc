"""A hang, a stopped rank, a dead rank and a rank's own error: the others say who and where. All with real ranks."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawned import RankError
from spawned import run_ranks as spawn

from wastenot.launch.env import Rank
from wastenot.launch.local import run_ranks
from wastenot.launch.watchdog import Watchdog
from wastenot.parallel.consult import consult
from wastenot.parallel.stopwatch import StreamWait

TIMEOUT, BEAT = 1.0, 0.3


def watched(rank: int, world: int, port: int, said: str, body: Callable[[int, Watchdog], None]) -> None:
    """One rank whose store lives in rank 0 and whose stderr is appended to the file `said`."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    me = Rank(rank=rank, world=world, local_rank=rank, local_world=world, launcher="torchrun")
    watchdog = Watchdog(me, store, TIMEOUT, beat_seconds=BEAT)
    watchdog.at(11, "training")
    all_reduce(watchdog, "gradients")
    body(rank, watchdog)
    watchdog.close()


def all_reduce(watchdog: Watchdog, name: str) -> None:
    watchdog.collective_entered(name, 4)
    dist.all_reduce(torch.ones(1))
    watchdog.collective_left(name, 0.1)


@pytest.fixture
def hang(tmp_path):
    """Runs watched ranks that hang; returns what they wrote to stderr, after checking that one ended with code 1."""

    def run(world: int, body: Callable[[int, Watchdog], None]) -> str:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        said = tmp_path / "said"
        with pytest.raises(RankError, match="exit code 1 "):
            spawn(world, watched, port, str(said), body, timeout=40)
        return said.read_text()

    return run


def read_from_a_slow_disk() -> None:
    time.sleep(60)


def load_slowly_on_rank_1(rank: int, watchdog: Watchdog) -> None:
    if rank == 1:
        watchdog.at(12, "data")
        read_from_a_slow_disk()
    watchdog.at(12, "training")
    all_reduce(watchdog, "dispatch")


def test_the_report_names_the_rank_that_has_not_arrived_and_where_it_is(hang):
    said = hang(2, load_slowly_on_rank_1)
    assert re.search(r'watchdog: rank 0 has waited 1 s in collective "dispatch" #2 \(step 12, training\)', said)
    assert "parallel.timeout_seconds is 1" in said
    assert re.search(
        r'rank 1 has not arrived: step 12, data, last collective "gradients" #1, not moved for \d+ s', said
    )
    assert re.search(r"at ranks/test_watchdog.py:\d+ read_from_a_slow_disk", said)
    assert re.search(r"in ranks/test_watchdog.py:\d+ load_slowly_on_rank_1", said)
    assert "waiting there: rank 0\n" in said


def receive_from_a_stage_that_reads(rank: int, watchdog: Watchdog) -> None:
    watchdog.stage = range(rank, rank + 1)
    if rank == 1:
        watchdog.at(12, "data")
        read_from_a_slow_disk()
    watchdog.at(12, "training")
    watchdog.collective_entered("pipeline-receive", 0)
    dist.recv(torch.ones(1), 1)


def test_a_stage_that_waits_for_another_tells_where_that_one_is(hang):
    said = hang(2, receive_from_a_stage_that_reads)
    assert 'watchdog: rank 0 has waited 1 s in collective "pipeline-receive" #2' in said
    assert "rank 1 of another pipeline stage waits for nothing: step 12, data" in said
    assert re.search(r"at ranks/test_watchdog.py:\d+ read_from_a_slow_disk", said)
    assert "do not agree" not in said
    assert "waiting there: rank 0\n" in said


def consult_over_a_slow_disk(rank: int, watchdog: Watchdog) -> None:
    watchdog.at(0, "loading")
    consult(dist.group.WORLD, read_from_a_slow_disk if rank == 1 else int, lambda answers: answers, watchdog)


def test_a_rank_that_others_wait_for_with_a_checkpoint_is_named(hang):
    said = hang(2, consult_over_a_slow_disk)
    assert 'rank 0 has waited 1 s in collective "checkpoint" #2 (step 0, loading)' in said
    assert 'rank 1 has not arrived: step 0, loading, last collective "gradients" #1' in said
    assert re.search(r"at ranks/test_watchdog.py:\d+ read_from_a_slow_disk", said)


def stop_rank_2(rank: int, watchdog: Watchdog) -> None:
    if rank == 2:
        watchdog.at(12, "training")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGSTOP)
    all_reduce(watchdog, "combine")


def test_one_rank_reports_for_all_and_a_stopped_one_is_called_dead_or_stopped(hang):
    said = hang(3, stop_rank_2)
    assert said.count("watchdog:") == 1
    assert 'rank 2 is dead or stopped: no heartbeat since step 12, training, last collective "gradients" #1' in said
    assert "waiting there: ranks 0, 1\n" in said


def stop_rank_0(rank: int, watchdog: Watchdog) -> None:
    watchdog.store_seconds = 0.5
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    all_reduce(watchdog, "combine")


def test_a_stopped_rank_0_takes_the_store_along_and_is_named(hang):
    said = hang(2, stop_rank_0)
    assert 'watchdog: rank 1 has waited 1 s in collective "combine" #2' in said
    assert "the store in rank 0's process does not answer: rank 0, or its host, is dead or stopped" in said


def disagree(rank: int, watchdog: Watchdog) -> None:
    watchdog.collective_entered("dispatch" if rank == 0 else "combine", 4)
    time.sleep(60)


def test_ranks_in_different_collectives_are_told_apart(hang):
    said = hang(2, disagree)
    assert re.search('rank . waits in "(dispatch|combine)" instead: the ranks do not agree on what comes next', said)


def launch_and_hang(rank: int, watchdog: Watchdog) -> None:
    if rank == 0:
        watchdog.collective_entered("dispatch", 4)
        # As on CUDA, where the host goes on and the device waits.
        watchdog.collective_left("dispatch", StreamWait.__new__(StreamWait))
    time.sleep(60)


def test_what_cuda_only_launched_counts_as_going_on(hang):
    said = hang(2, launch_and_hang)
    assert 'rank 0 has waited 1 s in collective "dispatch" #2' in said
    assert "rank 1 has not arrived" in said


def rest_between_collectives(rank: int, world: int, said: str) -> tuple[str, int]:
    watched(rank, world, int(Path(said).with_suffix(".port").read_text()), said, rest)
    return Path(said).read_text(), threading.active_count()


def rest(rank: int, watchdog: Watchdog) -> None:
    watchdog.at(12, "saving")
    time.sleep(2 * TIMEOUT)
    all_reduce(watchdog, "gradients")


def test_a_long_rest_outside_collectives_is_no_hang_and_the_end_leaves_no_threads(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        (tmp_path / "said.port").write_text(str(probe.getsockname()[1]))
    assert spawn(2, rest_between_collectives, str(tmp_path / "said")) == [("", 1)] * 2


PROGRAM = """
import os, signal, sys, time
import torch, torch.distributed as dist
from wastenot.launch import env
from wastenot.launch.watchdog import Watchdog
from wastenot.parallel.config import ParallelConfig

me = env.detect(os.environ)
store = env.start(me, ParallelConfig(timeout_seconds=20), torch.device("cpu"))
watchdog = Watchdog(me, store, 20, beat_seconds=0.2)
watchdog.at(11, "training")
try:
    if me.rank == int(sys.argv[2]):
        time.sleep(0.3)
        if sys.argv[1].startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("cause")
    watchdog.collective_entered("dispatch", 4)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        if sys.argv[1] == "killed while saving":
            watchdog.collective_left("dispatch", 0.0)
            raise OSError("not written") from error
        raise
except Exception as error:
    explanation = watchdog.explain(error)
    print(f"rank {me.rank} explains: {explanation or 'nothing'}", file=sys.stderr, flush=True)
    os._exit(1)
"""


@pytest.fixture
def fail(tmp_path, monkeypatch, capfd):
    """Runs two local ranks of which `victim` fails in `way`; returns what they and their launcher say."""

    def run(way: str, victim: int) -> str:
        (tmp_path / "failing_program.py").write_text(PROGRAM)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        assert run_ranks([way, str(victim)], 2, module="failing_program") == 1
        return capfd.readouterr().err

    return run


def test_a_rank_that_is_killed_is_named_by_the_other(fail):
    said = fail("killed", 1)
    assert "rank 1 of 2 was killed by SIGKILL" in said
    where = 'rank 0 waited in collective "dispatch" #1 (step 11, training)'
    assert f"rank 0 explains: {where}: rank 1 is dead or stopped: no heartbeat since step 11, training" in said


def test_a_rank_that_is_killed_is_named_where_another_error_comes_of_it(fail):
    where = 'rank 0 was at step 11, training, last collective "dispatch" #1'
    assert f"rank 0 explains: {where}: rank 1 is dead or stopped" in fail("killed while saving", 1)


def test_a_rank_0_that_is_killed_is_named_by_the_other(fail):
    said = fail("killed", 0)
    assert "rank 0 of 2 was killed by SIGKILL" in said
    where = 'rank 1 waited in collective "dispatch" #1 (step 11, training)'
    assert f"rank 1 explains: {where}: the store in rank 0's process does not answer: rank 0, or its host, is" in said


def test_the_rank_that_failed_first_is_named_with_its_error(fail):
    said = fail("raises", 0)
    assert "rank 0 explains: nothing" in said
    where = 'rank 1 waited in collective "dispatch" #1 (step 11, training)'
    assert f"rank 1 explains: {where}: rank 0 failed first: KeyError: 'cause'" in said


def test_a_world_of_one_watches_nothing_and_hearing_of_a_collective_costs_microseconds():
    watchdog = Watchdog(Rank(), None, 1.0)
    start = time.perf_counter()
    for _ in range(10_000):
        watchdog.collective_entered("dispatch", 1)
        watchdog.collective_left("dispatch", 0.1)
    assert (time.perf_counter() - start) / 10_000 < 50e-6
    assert watchdog.explain(RuntimeError("x")) == ""
    watchdog.close()
