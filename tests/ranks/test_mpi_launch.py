"""mpirun's ranks find each other: through mpi4py where no address is given, as told where one is."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="needs the extra `mpi`", exc_type=ImportError)

RANK = """
import os, sys
import torch, torch.distributed as dist
from wastenot.launch import env
from wastenot.launch.errors import UserError
from wastenot.parallel.config import ParallelConfig

me = env.detect(os.environ)
try:
    env.start(me, ParallelConfig(timeout_seconds=30), torch.device("cpu"))
except UserError as error:
    print(f"error: {error}")
    sys.exit(2)
total = torch.tensor([float(me.rank + 1)])
dist.all_reduce(total)
print(f"{me.launcher} {me.rank}/{me.world} {me.local_rank}/{me.local_world} {total.item()}")
env.stop()
"""


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def mpirun(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    beside = Path(sysconfig.get_path("scripts")) / "mpirun"
    command = str(beside) if beside.exists() else shutil.which("mpirun")
    if command is None:
        pytest.skip("no mpirun beside this Python or on PATH")
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    exported = [word for name in variables for word in ("-x", name)]
    options = ["-n", "2", "--oversubscribe", "--allow-run-as-root", *exported]
    return subprocess.run(
        [command, *options, sys.executable, "-W", "error", str(program)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


EXPECTED = ["openmpi 0/2 0/2 3.0", "openmpi 1/2 1/2 3.0"]


def test_mpirun_without_an_address_meets_through_mpi4py(tmp_path):
    run = mpirun(tmp_path)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == EXPECTED
    assert run.stderr == ""


def test_mpirun_with_an_address_needs_no_mpi4py(tmp_path, free_port):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('not installed')")
    run = mpirun(tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port))
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == EXPECTED
