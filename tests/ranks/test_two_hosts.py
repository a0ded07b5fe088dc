"""Ranks of two hosts, each a network namespace with its own name, find each other and the right interface, and train.

Both hosts also carry the same address on a `docker0`, as container hosts do: it answers, and leads nowhere. The
hosts' names resolve to nothing, so what gloo picks by itself (loopback) would fail.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest
from namespaces import ADDRESS, on_host, run_all, write_agent
from real_runs import finish, losses, start

LAYOUTS = [{"expert": 2, "tensor": 2, "data": 2}, {"expert": 1, "pipeline": 2, "data": 2}]
if os.environ.get("WASTENOT_GRID") == "full":
    LAYOUTS += [{"expert": 2, "data": 4}, {"expert": 4}, {"expert": 2, "shard": 2, "data": 2}]
TOOLS = Path(sysconfig.get_path("scripts"))
RANK = """
import os, torch, torch.distributed as dist
from wastenot.launch import env
from wastenot.parallel.config import ParallelConfig

me = env.detect(os.environ)
env.start(me, ParallelConfig(timeout_seconds=30), torch.device("cpu"))
total = torch.tensor([float(me.rank + 1)])
dist.all_reduce(total)
print(f"{me.launcher} {me.rank}/{me.world} {me.local_rank}/{me.local_world} {total.item()}", end=" ")
print(os.environ["GLOO_SOCKET_IFNAME"].partition("-")[0])
env.stop()
"""


@pytest.fixture
def program(tmp_path) -> Path:
    file = tmp_path / "rank.py"
    file.write_text(RANK)
    return file


def test_torchrun_on_two_hosts(hosts, program):
    options = f"--nnodes 2 --nproc-per-node 1 --master-addr {ADDRESS.format(1)} --master-port 29600"
    torchrun = f"{sys.executable} -m torch.distributed.run {options} --node-rank"
    assert run_all([on_host(hosts, node + 1, f"{torchrun} {node} {program}") for node in (0, 1)]) == [
        "torchrun 0/2 0/1 3.0 net",
        "torchrun 1/2 0/1 3.0 net",
    ]


def test_mpirun_on_two_hosts_finds_the_network_they_share(hosts, program, tmp_path):
    pytest.importorskip("mpi4py", reason="needs the extra `mpi`", exc_type=ImportError)
    if not (TOOLS / "mpirun").exists():
        pytest.skip("needs the extra `mpi`: no mpirun beside this Python")
    agent = write_agent(hosts, tmp_path / "agent")
    network = ADDRESS.format("0/24")
    mpirun = (
        f"{TOOLS / 'mpirun'} --allow-run-as-root -n 2 --host {ADDRESS.format(1)}:1,{ADDRESS.format(2)}:1 "
        f"--prtemca plm_ssh_agent {agent} --prtemca prte_if_include {network} --mca btl_tcp_if_include {network} "
        f"{sys.executable} {program}"
    )
    assert run_all([on_host(hosts, 1, mpirun)]) == ["openmpi 0/2 0/1 3.0 net", "openmpi 1/2 0/1 3.0 net"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_on_two_hosts_has_the_bits_of_one(hosts, made, layout):
    train = {"steps": 5, "batch": 8, "accumulate": 2, "eval_every": 0, "sample_tokens": 0}
    here, there = (made(parallel=layout, train=train) for _ in range(2))
    finish(start(here))
    torchrun = (
        f"OMP_NUM_THREADS=1 {sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 2 "
        f"--master-addr {ADDRESS.format(1)} --master-port {29610 + LAYOUTS.index(layout)} --node-rank"
    )
    run_all([on_host(hosts, node + 1, f"{torchrun} {node} -m wastenot.launch.train {there}") for node in (0, 1)])
    assert losses(there) == losses(here)
    assert list(losses(here)) == [1, 2, 3, 4, 5]
