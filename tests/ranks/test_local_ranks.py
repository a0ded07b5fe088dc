"""The launcher of local ranks: exit codes, signals, and that nothing it started stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from wastenot.launch.local import run_ranks


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a module that ranks can run; returns its name. `work` is a folder to leave traces in."""

    def write(body: str) -> str:
        head = "import os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        head += f"work = pathlib.Path({str(tmp_path)!r})\n"
        (tmp_path / "local_program.py").write_text(head + textwrap.dedent(body))
        return "local_program"

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


def test_local_ranks_meet_and_sum(program, tmp_path):
    module = program("""
        import torch, torch.distributed as dist
        from wastenot.launch import env
        from wastenot.parallel.config import ParallelConfig
        me = env.detect(os.environ)
        store = env.start(me, ParallelConfig(timeout_seconds=30), torch.device("cpu"))
        total = torch.tensor([float(me.rank + 1)])
        dist.all_reduce(total)
        second = store.clone()
        second.set(f"seen/{me.rank}", "x")
        second.wait(["seen/0", "seen/1", "seen/2"])
        text = f"{me.launcher} {me.local_rank}/{me.local_world} {total.item()} {os.environ['GLOO_SOCKET_IFNAME']}"
        (work / f"said-{rank}").write_text(text)
        env.stop()
    """)
    assert run_ranks([], 3, module=module) == 0
    assert [(tmp_path / f"said-{rank}").read_text() for rank in range(3)] == [
        f"torchrun {rank}/3 6.0 lo" for rank in range(3)
    ]


@pytest.mark.parametrize(
    ("codes", "expected", "said"),
    [((0, 0), 0, ""), ((0, 2), 2, ""), ((3, 0), 1, "rank 0 of 2 ended with exit code 3"), ((1, 2), 2, "")],
)
def test_exit_codes_are_joined(program, capfd, codes, expected, said):
    module = program("sys.exit(int(sys.argv[1 + rank]))")
    assert run_ranks([str(code) for code in codes], 2, module=module) == expected
    assert capfd.readouterr().err.strip() == said


def test_the_first_rank_that_fails_is_named_and_the_rest_killed_after_their_grace(program, capfd):
    module = program("""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """)
    start = time.monotonic()
    assert run_ranks([], 3, module=module, grace_seconds=0.3) == 1
    assert time.monotonic() - start < 10
    assert "rank 1 of 3 was killed by SIGKILL (out of memory?)" in capfd.readouterr().err


PARENT = "import sys; from wastenot.launch.local import run_ranks; sys.exit(run_ranks([], 2, module='local_program'))"


def parent_of(tmp_path: Path, started: int = 2) -> subprocess.Popen:
    """A process that runs two local ranks, once both have written `pid-RANK`."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(pids(tmp_path)) == started)
    return parent


def pids(tmp_path: Path) -> list[int]:
    return [int(file.read_text() or 0) for file in sorted(tmp_path.glob("pid-*"))]


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WAITS = """
def write_pid():
    file = work / f"pid-{rank}"
    file.with_suffix(".part").write_text(str(os.getpid()))
    file.with_suffix(".part").rename(file)
"""

CHECKPOINTS = (
    WAITS
    + """
def handler(number, frame):
    with open(work / f"signals-{rank}", "a") as file:
        file.write(f"{number} ")
    time.sleep(0.3)
    sys.exit(0)

signal.signal(signal.SIGTERM, handler)
signal.signal(signal.SIGINT, handler)
write_pid()
time.sleep(60)
"""
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_ranks_that_then_end_well_make_exit_code_0(program, tmp_path, number):
    program(CHECKPOINTS)
    parent = parent_of(tmp_path)
    assert all(os.getsid(pid) == pid for pid in pids(tmp_path))
    parent.send_signal(number)
    assert parent.communicate(timeout=20)[1] == ""
    assert parent.returncode == 0
    assert [(tmp_path / f"signals-{rank}").read_text() for rank in range(2)] == [f"{int(number)} "] * 2


def test_a_second_signal_kills(program, tmp_path):
    program(WAITS + "signal.signal(signal.SIGINT, signal.SIG_IGN)\nwrite_pid()\ntime.sleep(60)")
    parent = parent_of(tmp_path)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=20)
    assert parent.returncode == 1


def test_ranks_that_the_signal_ends_make_its_exit_code(program, tmp_path):
    program(WAITS + "write_pid()\ntime.sleep(60)")
    parent = parent_of(tmp_path)
    parent.send_signal(signal.SIGTERM)
    assert parent.communicate(timeout=20)[1] == ""
    assert parent.returncode == 128 + signal.SIGTERM


def test_ranks_die_with_a_parent_that_is_killed_even_while_stopped(program, tmp_path):
    program(WAITS + "write_pid()\nif rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)")
    parent = parent_of(tmp_path)
    parent.kill()
    parent.communicate(timeout=20)
    wait_for(lambda: not any(alive(pid) for pid in pids(tmp_path)))
