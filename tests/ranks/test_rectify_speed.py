"""`bench rectify-speed` on two real ranks: every figure is there, and what must not cost bytes does not."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess

import pytest

from wastenot.launch.config import DataConfig, LogConfig, LoopConfig, TrainConfig
from wastenot.moe.config import ModelConfig, MoEConfig
from wastenot.tools.bench import link, rectify_speed, rectify_trace
from wastenot.tools.bench.parity import make_corpus
from wastenot.tools.bench.rectify_cells import METHODS
from wastenot.tools.bench.rectify_contest import Case, Contest, check_bytes
from wastenot.tools.bench.rectify_methods import DisagreementError, check_first_step
from wastenot.tools.bench.report import Report

TOKENS, EXPERTS = 64, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("rectify-speed"))


@pytest.fixture(scope="module")
def contest(corpus, tmp_path_factory):
    config = rectify_trace.configure(top_k=1, experts=EXPERTS, layers=1, vocab_size=257)
    config = dataclasses.replace(config, train=LoopConfig(steps=2, batch=2))
    folder = tmp_path_factory.mktemp("traces")
    trace = rectify_trace.recorded(config, TOKENS, corpus, folder)
    assert rectify_trace.recorded(config, TOKENS, corpus, folder) == trace, "made once"
    assert list(folder.iterdir()) == [trace]
    base = TrainConfig(
        model=ModelConfig(vocab_size=257, d_model=32, layers=2, heads=2, moe=MoEConfig(experts=EXPERTS, d_expert=16)),
        data=DataConfig(tokenizer="bytes", seq_len=32),
        train=LoopConfig(batch=TOKENS // 32),
        log=LogConfig(dir="unused"),
    )
    cases = (Case("skewed", "padded", 1), Case("replay", "ragged", 1))
    return Contest(base=base, corpus=corpus, cases=cases, traces={1: trace}, rounds=2, warmup=1, budget_s=60.0)


def by_method(result, dispatch):
    return {row["method"]: row for row in result["rows"] if row["dispatch"] == dispatch}


def test_all_methods_are_measured_beside_each_other(contest):
    result = rectify_speed.launch(contest, 2, None)
    assert [row["method"] for row in result["rows"]] == [*METHODS] * 2
    choices = 2 * contest.base.model.layers * TOKENS
    for row in result["rows"]:
        assert row["rounds"] == 2 and row["step_seconds"] > 0 and 0 < row["gini"] < 1
        slots = row["slots"]
        assert slots["kept"] + slots["rectified"] + slots["dropped"] == choices
        assert row["expert_rows_max_over_mean"] >= 1 and row["saved_bytes"] > 0
        assert row["ledger_seconds"] > 0 and row["kernel_bytes"] is None, "loopback carries everyone's bytes"
    padded, ragged = by_method(result, "padded"), by_method(result, "ragged")
    assert padded["vanilla"]["vs_vanilla"] == padded["dropless"]["vs_dropless"] == 1
    assert padded["vanilla"]["sent_bytes"] == padded["both"]["sent_bytes"]
    assert ragged["vanilla"]["sent_bytes"] == ragged["IR"]["sent_bytes"] < ragged["dropless"]["sent_bytes"]
    assert padded["IR"]["slots"]["local_rows"] == padded["IR"]["slots"]["rectified"] > 0
    assert padded["IR"]["expert_rows"] == choices + padded["IR"]["slots"]["local_rows"]
    assert padded["FR"]["slots"]["padding"] < padded["vanilla"]["slots"]["padding"]
    assert ragged["dropless"]["slots"]["dropped"] == 0

    report = Report(name="", command="", env={}, rows=result["rows"], goals=rectify_speed.goals(result["rows"]))
    goals = {goal["metric"]: goal for goal in json.loads(report.to_json())["goals"]}
    assert goals["bytes that IR sends beyond vanilla, any case"]["value"] == 0
    filled = goals["2 ranks, top-1: part of the padded slots that FR fills"]["value"]
    assert filled == pytest.approx(padded["FR"]["slots"]["filled"] / padded["vanilla"]["slots"]["padding"])


def sent(**changes):
    """Bytes of three steps on two ranks, all methods alike but for `changes`."""
    return {method: changes.get(method, [[100, 100, 100], [90, 90, 90]]) for method in METHODS}


def test_bytes_that_rectification_must_not_send_are_refused():
    padded, ragged = Case("skewed", "padded", 1), Case("skewed", "ragged", 1)
    more = [[100, 100, 100], [91, 91, 91]]
    check_bytes(padded, sent(dropless=more))
    check_bytes(ragged, sent(FR=more, both=more, dropless=more))
    with pytest.raises(DisagreementError, match="IR: rank 1 sent 91 bytes a step, vanilla 90"):
        check_bytes(ragged, sent(IR=more))
    with pytest.raises(DisagreementError, match="FR: rank 1"):
        check_bytes(padded, sent(FR=more))
    with pytest.raises(DisagreementError, match="rank 0 sent 100, 101 bytes"):
        check_bytes(padded, sent(IR=[[100, 101, 100], [90, 90, 90]]))


def test_first_step_that_computes_something_else_is_refused():
    check_first_step("FR", (7.0, 1.0), (7.0 + 6e-5, 1.0 - 9e-5))
    for found in ((7.0001, 1.0), (7.0, 1.0002), (float("nan"), 1.0)):
        with pytest.raises(DisagreementError, match=r"FR: .* computed otherwise"):
            check_first_step("FR", found, (7.0, 1.0))


@pytest.fixture
def can_link():
    try:
        with link.shaped_link(1, "1gbit"):
            pass
    except link.NoLinkError as reason:
        pytest.skip(str(reason))


def ours() -> list[str]:
    """Namespaces of this process."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split() if name.startswith(f"wn{os.getpid()}-")]


RANK = """
import os, socket, sys
from wastenot.tools.bench.link import bytes_sent

where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
before = bytes_sent("eth0")
if os.environ["RANK"] == "0":
    with socket.create_server(where) as server, server.accept()[0] as peer:
        while peer.recv(65536):
            pass
else:
    while True:
        try:
            peer = socket.create_connection(where)
            break
        except ConnectionRefusedError:
            pass
    peer.sendall(bytes(300_000))
    # Until the other has all of it: some may still wait in a buffer here.
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    file.write(f"{os.environ['LOCAL_RANK']} {bytes_sent('eth0') - before}")
"""


def test_each_rank_runs_on_a_host_of_its_own(can_link, tmp_path, monkeypatch):
    (tmp_path / "a_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with link.shaped_link(2, "1gbit") as hosts:
        assert len(ours()) == 3, "two hosts and what connects them"
        assert link.run_ranks_on(hosts, "a_rank", [str(tmp_path / "rank")], 2) == 0
    assert not ours()
    (local_0, heard), (local_1, sent) = ((tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1))
    assert local_0 == local_1 == "0"
    assert int(heard) < 100_000 < 300_000 < int(sent) < 400_000, "acknowledgements; the bytes and their headers"


def test_hosts_are_gone_after_a_failure(can_link):
    with pytest.raises(KeyError), link.shaped_link(2, "1gbit"):
        assert ours()
        raise KeyError
    assert not ours()


def test_hosts_that_cannot_be_finished_are_gone_too(can_link):
    with pytest.raises(link.NoLinkError, match="fast"), link.shaped_link(2, "fast"):
        pass
    assert not ours()


def test_without_ip_there_is_no_link(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(link.NoLinkError, match="no network namespaces here"), link.shaped_link(2, "1gbit"):
        pass
