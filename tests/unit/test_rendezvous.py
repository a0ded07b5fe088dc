"""What keeps ranks apart is named: a taken port, a place nobody opens, a rank that never comes or is unlike others."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from wastenot.launch import alike, env, mpi, rendezvous
from wastenot.launch.alike import Makeup
from wastenot.launch.env import Rank
from wastenot.launch.errors import UserError
from wastenot.parallel.config import ParallelConfig


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port(taken_port):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def place(port: int, rank: int = 0, **more) -> Rank:
    return Rank(rank=rank, world=2, launcher="torchrun", address="127.0.0.1", port=port, **more)


def test_a_taken_port_is_named(taken_port):
    with pytest.raises(UserError, match=f"MASTER_PORT: {taken_port} cannot be used: it is taken on"):
        rendezvous.meet(place(taken_port, local_world=2), timedelta(seconds=5))


def test_a_place_that_nobody_opens_is_named(free_port):
    with pytest.raises(
        UserError, match=f"rank 1 on .* cannot reach rank 0 at 127.0.0.1:{free_port} within 1 s .*refused.*; check"
    ):
        rendezvous.meet(place(free_port, rank=1, local_world=2), timedelta(seconds=1))


def test_loopback_for_several_hosts_is_explained(free_port):
    with pytest.raises(UserError, match="MASTER_ADDR is this host's loopback; set it to an address that all hosts"):
        rendezvous.meet(place(free_port, rank=1, local_world=1), timedelta(seconds=1))


def test_a_rank_that_never_comes_is_counted(free_port):
    with pytest.raises(UserError, match="only 1 of 2 ranks came to"):
        rendezvous.meet(place(free_port, local_world=2), timedelta(seconds=1))


def test_ranks_that_are_unlike_are_told_so_alike(free_port):
    def meet(makeup: Makeup) -> str:
        rank = place(free_port, rank=makeup.rank, local_world=2)
        with pytest.raises(UserError) as refused:
            rendezvous.meet(rank, timedelta(seconds=20), makeup)
        return str(refused.value)

    here = Makeup(rank=0, host="a", versions={"torch": "2.13.0", "python": "3.11"}, config={"train": {"steps": 2}})
    there = Makeup(rank=1, host="b", versions={"torch": "2.11.0", "python": "3.11"}, config={"train": {"steps": 3}})
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(meet, [here, there])) == 2 * [
            "versions differ: torch is 2.13.0 on rank 0 (a), 2.11.0 on rank 1 (b); install the same on every host; "
            "configurations differ: train.steps is 2 on rank 0 (a), 3 on rank 1 (b); start every rank with the same one"
        ]


def test_versions_are_those_of_the_engine_and_no_import_of_it():
    code = "import sys\nfrom wastenot.launch import alike\nprint(*alike.versions('megatron'))\n"
    code += "print({'torch', 'deepspeed', 'megatron'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["python wastenot torch megatron-core", "set()"]
    assert alike.versions("deepspeed")["torch"] == torch.__version__.partition("+")[0]


def test_mpirun_without_mpi4py_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"pip install 'wastenot\[mpi\]'; .*or set MASTER_ADDR and MASTER_PORT"):
        mpi.agree(rank=0, world=2)


def test_a_world_of_one_has_no_process_group():
    threads = torch.get_num_threads()
    try:
        assert env.start(Rank(threads=1), ParallelConfig(), torch.device("cpu")) is None
        assert torch.get_num_threads() == 1
        assert not torch.distributed.is_initialized()
        env.stop()
    finally:
        torch.set_num_threads(threads)


def test_nccl_without_a_device_is_refused():
    with pytest.raises(UserError, match="nccl needs CUDA devices"):
        env.start(Rank(), ParallelConfig(backend="nccl"), torch.device("cpu"))


def test_collectives_outlast_the_watchdog():
    for seconds in (1.0, 600.0, 7200.0):
        assert rendezvous.group_timeout(seconds) > seconds + 30
