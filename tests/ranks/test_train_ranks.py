"""`bench train-ranks` on real ranks: every contender computes the same on one and on two, and is measured on both."""

from __future__ import annotations

import os

import pytest
import torch

from wastenot.moe.config import ModelConfig, MoEConfig
from wastenot.tools.bench import train_ranks
from wastenot.tools.bench.agreement import Difference
from wastenot.tools.bench.cases import Case
from wastenot.tools.bench.interleave import Timings
from wastenot.tools.bench.peers.remote import Place, Ranks
from wastenot.tools.bench.peers.roster import ENTRIES, OURS, LeftOut, check_installed
from wastenot.tools.bench.train_ranks import APART, HALVES, ONE, TWO, Checked, goals_of, key, row_of

PEER = "transformers eager"
CORES = (sorted(os.sched_getaffinity(0)) * 2)[:2]


def tiny(**changes):
    # Small weights: in bf16 no token changes its mind by more than the band allows.
    model = ModelConfig(
        vocab_size=64, d_model=32, layers=2, heads=4, kv_heads=2, moe=MoEConfig(experts=4, d_expert=32), init_std=0.05
    )
    return Case(**{"name": "tiny", "model": model, "top_k": 2, "batch": 2, "seq_len": 16, **changes})


def entry(name):
    return next(entry for entry in ENTRIES if entry.name == name)


def installed():
    """Entries that this machine has the packages of."""
    found = []
    for each in ENTRIES:
        try:
            check_installed(each)
        except LeftOut:
            continue
        found.append(each)
    return tuple(found)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_contenders_agree_and_are_measured_on_one_and_two_ranks(dtype):
    entries = installed()
    if PEER not in [each.name for each in entries]:
        pytest.skip("transformers, the reference, is not installed")
    rows, goals = train_ranks.run_case(tiny(dtype=dtype), entries, CORES, rounds=2, warmup=0, say=lambda text: None)
    assert [row["contender"] for row in rows] == [each.name for each in entries]
    for row in rows:
        assert row["why_not"] is None
        assert row["rounds"] == 2 and row["scaling"] > 0
        assert row["tokens_per_second_1_rank"] > 0 and row["tokens_per_second_2_ranks"] > 0
    ours = rows[0]
    assert ours["scaling_without_communication"] > 0 and ours["strong_scaling"] > 0
    measured = next(goal for goal in goals if "peers measured" in goal.metric)
    assert measured.met and measured.value == len(entries) - 1


@pytest.fixture
def timings():
    """Two rounds; the second on a machine of half the speed."""
    seconds = {
        key(OURS, ONE): 1.0,
        key(OURS, TWO): 1.25,
        key(OURS, APART): 1.1,
        key(OURS, HALVES): 0.625,
        key(PEER, ONE): 1.5,
        key(PEER, TWO): 2.0,
    }
    return Timings({name: [took, 2 * took] for name, took in seconds.items()})


def test_rows_hold_speed_and_scaling(timings):
    case = tiny()
    agrees = Difference(loss=1e-6, norm=1e-5, agrees=True)
    ours = row_of(case, Checked(entry(OURS), loss=4.0, difference=agrees, timings=timings))
    # 32 tokens on a rank in the median of 1 and 2 seconds, 64 on two in that of 1.25 and 2.5.
    assert ours["tokens_per_second_1_rank"] == pytest.approx(32 / 1.5)
    assert ours["tokens_per_second_2_ranks"] == pytest.approx(64 / 1.875)
    assert ours["scaling"] == pytest.approx(0.8)
    assert ours["scaling_without_communication"] == pytest.approx(1 / 1.1)
    assert ours["scaling_of_possible"] == pytest.approx(1.1 / 1.25)
    assert ours["strong_scaling"] == pytest.approx(1 / 0.625 / 2)
    theirs = row_of(case, Checked(entry(PEER), loss=4.0, difference=agrees, timings=timings))
    assert theirs["wastenot_speedup_1_rank"] == pytest.approx(1.5)
    assert theirs["wastenot_speedup_2_ranks"] == pytest.approx(1.6)
    assert theirs["scaling"] == pytest.approx(0.75)


def test_goals_name_the_best_peer_and_count_those_left_out(timings):
    measured = [Checked(entry(name), timings=timings) for name in (OURS, PEER)]
    left_out = Checked(entry("deepspeed"), why_not="left out: no")
    speed, peers, scaling = goals_of(tiny(), [*measured, left_out])
    assert f"({PEER})" in speed.metric and speed.value == pytest.approx(1.6) and speed.met
    assert (peers.value, peers.met) == (1, False)
    assert scaling.value == pytest.approx(0.8) and not scaling.met


def test_without_us_no_goal_is_met(timings):
    theirs = Timings({name: took for name, took in timings.seconds.items() if not name.startswith(OURS)})
    checked = [Checked(entry(OURS), why_not="wrong"), Checked(entry(PEER), timings=theirs)]
    speed, _, scaling = goals_of(tiny(), checked)
    assert (speed.value, speed.met, scaling.value, scaling.met) == (None, False, None, False)


def test_batches_of_all_ways():
    # 2 on a rank: the same on each of two, or the same in all.
    assert [way.batch(tiny()) for way in (ONE, TWO, APART, HALVES)] == [2, 4, 2, 2]


def test_contender_that_disagrees_is_not_timed(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(train_ranks, "expected_of", lambda case, bench: (1.0, 1.0))
    [row], goals = train_ranks.run_case(tiny(), (entry(OURS),), CORES, rounds=1, warmup=0, say=lambda text: None)
    assert "not timed" in row["why_not"] and "scaling" not in row and row["loss_difference"] > 1
    assert not any(goal.met for goal in goals[::2])


class Where:
    """A contender that says where it is."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def probe(self):
        return self.place.rank, self.place.world, torch.get_num_threads()

    def run(self) -> float:
        return 1.0 + self.place.rank


def where_or_fail(fails: int, place: Place) -> Where:
    if place.rank == fails:
        raise ValueError("this rank cannot")
    return Where(place)


def test_a_round_takes_as_long_as_its_slowest_rank():
    ranks = Ranks("test", where_or_fail, -1, cores=CORES)
    try:
        assert ranks.probe() == (0, 2, 1)
        assert ranks.run() == 2.0
    finally:
        ranks.close()
    apart = Ranks("test", where_or_fail, -1, cores=CORES, together=False)
    try:
        assert apart.probe() == (0, 1, 1)
        assert apart.run() == 1.0
    finally:
        apart.close()


def test_failure_of_one_rank_is_told_and_ends_the_others():
    with pytest.raises(RuntimeError, match=r"bench-test-1 failed:[\s\S]*this rank cannot"):
        Ranks("test", where_or_fail, 1, cores=CORES)
