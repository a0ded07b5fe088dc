"""Routing skew: shares, rows of ranks, the slowest one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.layout import Layout
from wastenot.parallel.lynx.routing_skew import UNIFORM, Skew, exchange_seconds, load_of, parse_skew, shares
from wastenot.parallel.lynx.shape import Experts
from wastenot.parallel.lynx.traffic import (
    all_to_all_bytes,
)
from wastenot.tools.lynx_input import read_model

H100 = read_cluster("h100-nvlink8-ib")
DEEPSEEK = read_model("deepseek-v3").shape


@settings(deadline=None)
@given(st.integers(1, 64), st.data())
def test_shares_are_a_distribution(experts, data) -> None:
    top_k = data.draw(st.integers(1, experts))
    counts = data.draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts).filter(any))
    for skew in (UNIFORM, Skew(exponent=data.draw(st.floats(0, 40))), Skew(counts=tuple(map(float, counts)))):
        found = shares(skew, experts, top_k)
        assert math.fsum(found) == pytest.approx(1)
        assert max(found) <= 1 / top_k * (1 + 1e-9)
        assert min(found) >= 0


@settings(deadline=None)
@given(st.integers(2, 32), st.floats(0, 3), st.floats(0.01, 3))
def test_more_skew_makes_the_favourite_no_less_popular(experts, exponent, more) -> None:
    less = shares(Skew(exponent=exponent), experts, 1)
    assert shares(Skew(exponent=exponent + more), experts, 1)[0] >= less[0]
    assert list(less) == sorted(less, reverse=True)


def test_shares_by_hand() -> None:
    assert shares(UNIFORM, 4, 2) == (0.25,) * 4
    assert shares(Skew(exponent=1), 2, 1) == pytest.approx((2 / 3, 1 / 3))
    # Nobody is chosen twice by a token: the first has half, the others share the rest as 1/2 to 1/3.
    assert shares(Skew(exponent=1), 3, 2) == pytest.approx((0.5, 0.3, 0.2))
    assert shares(Skew(counts=(8, 0, 0, 0)), 4, 2) == pytest.approx((0.5, 1 / 6, 1 / 6, 1 / 6))


EXPERTS = Experts(experts=8, top_k=2, d_expert=16)


@settings(deadline=None)
@given(st.floats(0, 3), st.sampled_from([1, 2, 4, 8]), st.none() | st.floats(0.2, 3), st.booleans())
def test_rows_of_ranks(exponent, expert, capacity, padded) -> None:
    layout = Layout(
        seq_len=512, data=8, expert=expert, capacity_factor=capacity, padded=padded and capacity is not None
    )
    load = load_of(EXPERTS, layout, Skew(exponent=exponent))
    routes = 512 * 2
    assert 0 <= load.dropped < 1
    if not layout.padded:
        assert sum(load.sent) == pytest.approx(routes * (1 - load.dropped))
    assert load.fullest >= math.floor(load.mean)
    if capacity is None:
        assert load.dropped == pytest.approx(0, abs=1e-9)
        spans = (expert,)
        assert sum(load.volumes(spans, 1.0)) >= sum(all_to_all_bytes(spans, routes)) - 1e-6
    else:
        slots = math.ceil(2 * capacity * 512 / 8) * 8 // expert
        assert max(load.sent) <= slots + 1e-9
        if layout.padded:
            assert set(load.sent) == {slots}


def test_uniform_routing_sends_as_an_even_all_to_all() -> None:
    experts = Experts(experts=64, top_k=4, d_expert=16)
    load = load_of(experts, Layout(seq_len=1024, data=64, expert=64))
    assert load.fullest == load.num_sent == 4096
    assert load.volumes((8, 64), 10.0) == pytest.approx(all_to_all_bytes((8, 64), 40960))


def test_the_slowest_rank_by_hand() -> None:
    """Two ranks of four experts, 100 tokens of one choice, three of four on rank 0: it gets 75 from the other, and
    the other sends 75."""
    load = load_of(
        replace(EXPERTS, top_k=1), Layout(seq_len=100, data=2, expert=2), Skew(counts=(3, 0, 0, 0, 1, 0, 0, 0))
    )
    assert load.sent == pytest.approx((75, 25))
    assert (load.fullest, load.num_sent) == (150, 100)
    assert load.volumes((2,), 1.0) == pytest.approx((75,))


def test_a_merged_dispatch_crosses_to_each_node_once() -> None:
    """DeepSeek-V3 on 8 nodes: a token's 8 experts are on 8 (1 - (7/8)^8) nodes on average, and on 4 at most."""
    experts = DEEPSEEK.experts
    assert experts is not None
    layout = Layout(seq_len=4096, data=64, expert=64)
    free = load_of(replace(experts, groups=1, top_groups=1), layout)
    assert free.merged_volumes((8, 64), 1.0)[1] == pytest.approx(4096 * 7 * (1 - (7 / 8) ** 8))
    limited = load_of(experts, layout)
    assert limited.merged_volumes((8, 64), 1.0)[1] == pytest.approx(4096 * 3.5)
    assert limited.volumes((8, 64), 1.0)[1] == pytest.approx(4096 * 7)
    # Inside a node come the rows of all its tokens and of all that crossed, but for what stays where it is.
    assert limited.merged_volumes((8, 64), 1.0)[0] == pytest.approx(4096 * 8 * 7 / 8)
    assert limited.merged_volumes((64, 64), 1.0) == limited.volumes((64, 64), 1.0)
    merged = exchange_seconds(H100, replace(layout, merged_dispatch=True), limited, 14336)
    assert merged < exchange_seconds(H100, layout, limited, 14336)


def test_the_favourite_node_receives_most_of_a_merged_dispatch() -> None:
    """Four nodes of two ranks, 100 tokens each, all to the first node: its two ranks share what six send."""
    load = load_of(replace(EXPERTS, top_k=1), Layout(seq_len=100, data=8, expert=8), Skew(counts=(1, 1) + (0,) * 6))
    assert load.merged_volumes((2, 8), 1.0)[1] == pytest.approx(100 * 6 / 2)


def test_skews_by_name(tmp_path: Path) -> None:
    assert parse_skew("uniform") == UNIFORM
    assert parse_skew("zipf:1.2").exponent == 1.2
    path = tmp_path / "layer3.yaml"
    path.write_text("[5, 3, 0, 8]")
    assert parse_skew(str(path)) == Skew(name="recorded:layer3.yaml", counts=(5, 3, 0, 8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zipf:much", "skew: 'zipf:much': 'much' is no exponent; use a number from 0 on, for example zipf:1.0"),
        ("zipf:-1", "skew: 'zipf:-1': '-1' is no exponent"),
        ("unifrom", "skew: 'unifrom' is no skew and no file of a histogram; did you mean uniform?"),
        ("FILE", "skew: FILE: no list of counts, one for each expert, of which one is positive"),
    ],
)
def test_wrong_skews_are_one_line(text, message, tmp_path: Path) -> None:
    if text == "FILE":
        path = tmp_path / "counts.yaml"
        path.write_text("[0, 0]")
        text, message = str(path), message.replace("FILE", str(path))
    with pytest.raises(ValueError) as caught:
        parse_skew(text)
    assert str(caught.value).startswith(message)
