"""Clusters, units and collectives: one-line errors, exact volumes, seconds by latency and bandwidth."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.parallel.lynx.cluster import cluster_from, reach, read_cluster, shipped_clusters
from wastenot.parallel.lynx.cost import Roofline
from wastenot.parallel.lynx.layout import Group
from wastenot.parallel.lynx.traffic import (
    all_reduce_bytes,
    all_reduce_seconds,
    all_to_all_bytes,
    all_to_all_seconds,
    reduce_scatter_bytes,
    reduce_scatter_seconds,
    send_seconds,
)
from wastenot.parallel.lynx.units import parse_quantity, show_bytes, show_quantity

H100 = read_cluster("h100-nvlink8-ib")


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("80GiB", "B", 80 * 2**30),
        ("141 GB", "B", 141e9),
        ("450GB/s", "B/s", 450e9),
        ("3.35tb/s", "B/s", 3.35e12),
        ("989.4TFLOP/s", "FLOP/s", 989.4e12),
        ("3us", "s", 3e-6),
        ("1e-3s", "s", 1e-3),
        ("1_000B", "B", 1000),
    ],
)
def test_quantities(text, unit, value) -> None:
    assert parse_quantity(text, unit, "x") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "unit", "message"),
    [
        (80, "B", "memory: 80 has no unit; write for example 80GiB"),
        ("450", "B/s", "memory: 450 has no unit; write for example 450GB/s"),
        ("450GB", "B/s", "memory: '450GB' is not in B/s; use one of B/s, kB/s, MB/s, GB/s, TB/s"),
        ("3Ms", "s", "memory: '3Ms' is not in s; use one of ns, us, ms, s, min, for example 3us"),
        ("-1GiB", "B", "memory: -1GiB is not positive; write for example 1GiB"),
        ("much", "B", "memory: 'much' is no quantity; write for example 80GiB"),
        (None, "B", "memory: None is no quantity"),
    ],
)
def test_wrong_quantities_are_one_line(value, unit, message) -> None:
    with pytest.raises(ValueError) as caught:
        parse_quantity(value, unit, "memory")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.floats(1e-12, 1e18), st.sampled_from(["B", "B/s", "FLOP/s", "s"]))
def test_quantities_are_written_as_they_are_read(value, unit) -> None:
    assert parse_quantity(show_quantity(value, unit), unit, "x") == value


def test_bytes_are_shown_short() -> None:
    assert [show_bytes(n) for n in (0, 1023, 79.2 * 2**30, 1536, 3 * 2**50)] == [
        "0 B",
        "1023 B",
        "79.2 GiB",
        "1.5 KiB",
        "3 PiB",
    ]


def test_shipped_clusters_are_read() -> None:
    known = shipped_clusters()
    assert set(known) == {f"{gpu}-nvlink8-ib" for gpu in ("a100", "b200", "h100", "h200")} | {"cpu-gloo"}
    for name in known:
        cluster = read_cluster(name)
        assert cluster.name == name
        assert cluster.links[-1].devices >= 131072
        assert cluster.peak("bf16") > cluster.peak("fp32")


PLAIN = {
    "device": {
        "name": "one",
        "memory": "8GiB",
        "bandwidth": "10GB/s",
        "launch": "1us",
        "peak": {"fp32": "1TFLOP/s"},
    },
    "links": [
        {
            "name": "inner",
            "devices": 8,
            "latency": "1us",
            "bandwidth": "100GB/s",
            "collective": 1,
            "all_to_all": 0.5,
            "slowdown": 0.9,
        },
        {
            "name": "outer",
            "latency": "10us",
            "bandwidth": "10GB/s",
            "collective": 1,
            "all_to_all": 0.5,
            "slowdown": 1,
        },
    ],
    "efficiency": {"matmul": 0.5, "grouped": 0.5, "attention": 0.5, "attention_backward": 0.5, "memory": 0.5},
    "allowance": {"context": "1GiB", "fragmentation": 0},
}
SMALL = cluster_from(PLAIN, "small", "small.yaml")


def test_a_cluster_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(shipped_clusters()["h100-nvlink8-ib"])
    assert read_cluster(str(path)) == replace(H100, name="own")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": {}}, "c.yaml: unknown key 'devices'; did you mean device?"),
        ({"device": PLAIN["device"] | {"memory": 80}}, "c.yaml: device.memory: 80 has no unit; write"),
        ({"device": {"name": "one"}}, "c.yaml: device: memory is missing; its keys are name, memory"),
        ({"device": PLAIN["device"] | {"peak": {}}}, "c.yaml: device.peak: {} is no mapping of dtypes to FLOP/s"),
        ({"links": []}, "c.yaml: links: [] is no list; give at least one link"),
        ({"links": [PLAIN["links"][1], PLAIN["links"][1]]}, "c.yaml: links[0]: devices is missing"),
        ({"links": [PLAIN["links"][0] | {"slowdown": 1.5}]}, "c.yaml: links[0].slowdown: 1.5 is no part of 1; use"),
        ({"links": [PLAIN["links"][0], PLAIN["links"][0]]}, "c.yaml: links: inner connects 8 devices, no more than"),
        ({"links": [PLAIN["links"][0] | {"devices": "8"}]}, "c.yaml: links[0].devices: '8' is no number of devices"),
        ({"efficiency": PLAIN["efficiency"] | {"memory": 0}}, "c.yaml: efficiency.memory: 0 is no part of 1"),
    ],
)
def test_wrong_clusters_are_one_line(change, message) -> None:
    with pytest.raises(ValueError) as caught:
        cluster_from(PLAIN | change, "c", "c.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_unknown_clusters_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="cluster: no file and no cluster is called 'h100-nvlink-ib'; did you mean h100-"
    ):
        read_cluster("h100-nvlink-ib")
    broken = tmp_path / "broken.yaml"
    broken.write_text("device: {")
    with pytest.raises(ValueError, match=r"broken\.yaml: not YAML"):
        read_cluster(str(broken))


def test_groups_reach_through_links() -> None:
    assert reach(SMALL, Group(8)) == (8, 8)
    assert reach(SMALL, Group(64)) == (8, 64)
    assert reach(SMALL, Group(4, 2)) == (4, 4)
    assert reach(SMALL, Group(16, 4)) == (2, 16)
    assert reach(SMALL, Group(16, 64)) == (1, 16)
    one_node = replace(SMALL, links=SMALL.links[:1])
    with pytest.raises(ValueError, match="small: 16 ranks at a distance of 1 are more than its 8 devices; use fewer"):
        reach(one_node, Group(16))


spans = st.lists(st.integers(1, 8), min_size=1, max_size=3).map(
    lambda factors: tuple(math.prod(factors[: i + 1]) for i in range(len(factors)))
)


@settings(deadline=None)
@given(spans, st.floats(0, 1e12))
def test_volumes_sum_to_the_closed_forms(spans, size) -> None:
    n = spans[-1]
    assert sum(reduce_scatter_bytes(spans, size)) == pytest.approx(size * (n - 1) / n)
    assert sum(all_reduce_bytes(spans, size)) == pytest.approx(2 * size * (n - 1) / n)
    assert sum(all_to_all_bytes(spans, size)) == pytest.approx(size * (n - 1) / n)


def test_volumes_of_two_nodes_of_eight() -> None:
    """All-reduce: 7/8 in the node, each eighth's half between the nodes, 7/8 again. All-to-all: 7 near, 8 far."""
    assert all_reduce_bytes((8, 16), 1600) == (2 * 1400, 2 * 100)
    assert all_to_all_bytes((8, 16), 1600) == (700, 800)
    assert reduce_scatter_bytes((1, 16), 1600) == (0, 1500)


def test_seconds_are_latency_and_the_slowest_link() -> None:
    assert reduce_scatter_seconds(SMALL, Group(8), 8e9) == pytest.approx(3e-6 + 7e9 / 100e9)
    assert all_reduce_seconds(SMALL, Group(16), 16e9) == pytest.approx(2 * (3e-6 + 1e-5) + 28e9 / 100e9)
    volumes = all_to_all_bytes((8, 16), 16e9)
    assert all_to_all_seconds(SMALL, Group(16), volumes) == pytest.approx(3e-6 + 1e-5 + 8e9 / 5e9)
    assert send_seconds(SMALL, 1, 1e9) == pytest.approx(1e-6 + 0.01)
    assert send_seconds(SMALL, 8, 1e9) == pytest.approx(1e-5 + 0.1)


@settings(deadline=None)
@given(st.sampled_from([2, 4, 8, 16, 64]), st.floats(1, 1e9), st.floats(1.1, 10))
def test_more_bytes_take_longer(size, volume, factor) -> None:
    for seconds in (all_reduce_seconds, reduce_scatter_seconds):
        assert seconds(H100, Group(size), volume * factor) > seconds(H100, Group(size), volume) > 0


def test_roofline_by_hand() -> None:
    """A large product is bound by compute, a vector's by memory."""
    time = Roofline(SMALL, "fp32")
    assert time.matmul(1000, 1000, 1000, 4) == pytest.approx(1e-6 + 2e9 / 0.5e12)
    assert time.matmul(1, 1000, 1000, 4) == pytest.approx(1e-6 + 4 * 1_002_000 / 5e9)
    assert time.grouped(1000, 1000, 1000, 50, 4) == pytest.approx(1e-6 + 4 * 52_000_000 / 5e9)
    assert time.memory(5e9) == pytest.approx(1 + 1e-6)
    assert time.memory(0) == time.matmul(0, 5, 5, 4) == time.grouped(0, 5, 5, 1, 4) == 0
    with pytest.raises(ValueError, match=r"small: device\.peak has no bf16; known: fp32"):
        Roofline(SMALL, "bf16").matmul(1, 1, 1, 2)
