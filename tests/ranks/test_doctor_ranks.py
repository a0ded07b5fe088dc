"""`wastenot doctor` under a launcher: one rank speaks for all, and all agree on the exit code."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
from spawned import run_ranks

from wastenot.tools import selftest, selftest_parity
from wastenot.tools.cli import main


def doctor(rank: int, world: int, port: int, claims: list[dict[str, str]], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a rank that claims to be `claims[rank]`."""
    dist.destroy_process_group()
    del os.environ["GLOO_SOCKET_IFNAME"]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **claims[rank]}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["doctor", "--json", *arguments])
    return code, out.getvalue(), err.getvalue()


def claim(rank: int, world: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
    }


@pytest.fixture
def examine():
    """Runs doctor on ranks that make these claims; returns its report and exit codes."""

    def run(claims: list[dict[str, str]], *arguments: str) -> tuple[dict, list[int]]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        found = run_ranks(len(claims), doctor, port, claims, *arguments)
        spoken = [out for _, out, _ in found if out]
        assert len(spoken) == 1, found
        return json.loads(spoken[0]), [code for code, _, _ in found]

    return run


def test_ranks_that_fit_are_mapped_and_their_collectives_tested(examine):
    report, codes = examine([claim(rank, 3) for rank in range(3)], "--selftest")
    assert codes == [0, 0, 0]
    assert report["problems"] == []
    assert sorted((r["rank"], r["local_rank"], r["interface"]) for r in report["ranks"]) == [
        (rank, rank, "lo") for rank in range(3)
    ]
    assert [finding["good"] for finding in report["selftest"]] == [True] * 7


def test_a_number_that_differs_or_is_none_fails_the_selftest():
    for difference, said in ((1e-3, "by 1e-03; ranks [0]"), (math.nan, "by nan; ranks [0]")):
        (found,) = run_ranks(1, training_findings, difference)[0]
        assert not found.good
        assert found.detail.endswith(said)


def training_findings(rank: int, world: int, difference: float) -> list[selftest.Finding]:
    selftest_parity.largest_difference = lambda *_: difference
    return selftest._check_training(torch.device("cpu"), None)  # pyright: ignore[reportArgumentType]


def test_two_processes_of_one_rank_meet_and_are_told_apart(examine):
    report, codes = examine([claim(0, 2), claim(0, 2)])
    assert codes == [2, 2]
    twice, absent = sorted(report["problems"])
    assert twice.startswith("RANK 0 is claimed by process ")
    assert absent.startswith("of 2 ranks [1] did not come")


def test_a_contradicting_world_size_is_named(examine):
    report, codes = examine([claim(0, 2), claim(1, 3)])
    assert codes == [2, 2]
    assert any("disagree on WORLD_SIZE: 2 say ranks 0; 3 say ranks 1" in problem for problem in report["problems"])
