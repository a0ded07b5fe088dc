"""An elastic restart: torchrun starts all ranks again after one failed, and they meet as if for the first time."""

from __future__ import annotations

import subprocess
import sys

RANK = """
import os, torch, torch.distributed as dist
from wastenot.launch import env
from wastenot.launch.watchdog import Watchdog
from wastenot.parallel.config import ParallelConfig

me = env.detect(os.environ)
store = env.start(me, ParallelConfig(timeout_seconds=30), torch.device("cpu"))
watchdog = Watchdog(me, store, 30)
total = torch.tensor([float(me.rank + 1)])
dist.all_reduce(total)
if me.rank == 1 and me.attempt == 0:
    os._exit(7)
if me.attempt:
    # One write: the ranks share a pipe, and print writes its newline apart.
    os.write(1, f"attempt {me.attempt} rank {me.rank} sum {total.item()}\\n".encode())
dist.barrier()
watchdog.close()
env.stop()
"""


def test_ranks_meet_again_after_a_restart(tmp_path):
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(program)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == [f"attempt 1 rank {rank} sum 3.0" for rank in range(2)]
