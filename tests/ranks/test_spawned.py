"""The harness that the other rank tests stand on: results, first failure, death, hang."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from spawned import RankError, run_ranks


def exchange(rank: int, world: int, scale: float) -> tuple[float, torch.Tensor]:
    total = torch.tensor(rank * scale)
    dist.all_reduce(total)
    return total.item(), torch.full((2,), rank)


def test_results_come_back_in_order_of_rank():
    results = run_ranks(3, exchange, 10.0)
    assert [total for total, _ in results] == [30.0] * 3
    assert [tensor.tolist() for _, tensor in results] == [[0, 0], [1, 1], [2, 2]]


def surroundings(rank: int, world: int) -> tuple[int, bool, str | None]:
    return torch.get_num_threads(), bool(torch.empty(4).isnan().all()), os.environ.get("SEEN_BY_RANKS")


def test_ranks_have_one_thread_unwritten_memory_is_nan_and_the_environment_is_the_tests(monkeypatch):
    monkeypatch.setenv("SEEN_BY_RANKS", "yes")
    assert run_ranks(2, surroundings) == [(1, True, "yes")] * 2


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(0.1)
        raise KeyError("the cause")
    dist.barrier()


def test_the_first_failing_rank_is_the_one_raised():
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*fail_on_one.*KeyError: 'the cause'"):
        run_ranks(3, fail_on_one)


def die_on_one(rank: int, world: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_rank_that_dies_is_named_not_its_witness():
    with pytest.raises(RankError, match=r"rank 1 failed\n.*exit code -9"):
        run_ranks(2, die_on_one)


def sleep_on_one(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(60)
    dist.barrier()


def test_a_hang_ends_with_the_stack_of_every_rank():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)\[0, 1\] did not finish within 1 s.*barrier.*sleep_on_one"):
        run_ranks(2, sleep_on_one, timeout=1.0)
    assert time.monotonic() - start < 10


def stop_oneself(rank: int, world: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_rank_is_killed_too():
    with pytest.raises(TimeoutError, match="did not finish"):
        run_ranks(1, stop_oneself, timeout=0.5)


def warn(rank: int, world: int) -> None:
    warnings.warn("look here", UserWarning, stacklevel=1)


def test_a_warning_in_a_rank_is_an_error():
    with pytest.raises(RankError, match="UserWarning: look here"):
        run_ranks(1, warn)
