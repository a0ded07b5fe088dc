"""Calibration: a file that replaces assumed figures by measured ones, and says how far they were off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from wastenot.parallel.lynx.calibration import (
    Calibration,
    LayerTimes,
    calibrated,
    calibration_from,
    drift,
    fingerprint,
    read_calibration,
    timed,
    timed_work,
    write_calibration,
)
from wastenot.parallel.lynx.cluster import Cluster, read_cluster
from wastenot.parallel.lynx.layout import Layout
from wastenot.parallel.lynx.routing_skew import UNIFORM
from wastenot.parallel.lynx.work import work_of
from wastenot.tools.lynx_input import read_model

H100 = read_cluster("h100-nvlink8-ib")
MIXTRAL = read_model("mixtral-8x7b").shape


LAYOUT = Layout(seq_len=1024, data=8, expert=8)
WORK = fingerprint(MIXTRAL, LAYOUT, UNIFORM)
MEASURED = Calibration(
    machine="a machine",
    date="2026-11-20",
    versions={"torch": "2.13.0"},
    cluster="h100-nvlink8-ib",
    device={"launch": 4.5e-6},
    peak={"bf16": 7.5e14},
    efficiency={"matmul": 0.71},
    links={"nvlink": {"latency": 2.4e-6, "all_to_all": 0.66}},
    layers={"moe": LayerTimes(work=WORK, seconds={"expert up": 1.25e-3, "dispatch": 7e-4, "expert up backward": 2e-3})},
    notes=("layers.dense: not measured: the model has none",),
    samples={"nvlink all-to-all": ((1048576.0, 4.1e-5),)},
)


def test_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_calibration(MEASURED, tmp_path / "machine.yaml")
    assert read_calibration(tmp_path / "machine.yaml") == MEASURED


def test_calibration_replaces_what_was_measured_alone() -> None:
    cluster: Cluster = calibrated(H100, MEASURED)
    assert (cluster.device.launch, cluster.device.memory) == (4.5e-6, H100.device.memory)
    assert cluster.device.peak == {**H100.device.peak, "bf16": 7.5e14}
    assert (cluster.efficiency.matmul, cluster.efficiency.grouped) == (0.71, H100.efficiency.grouped)
    assert (cluster.links[0].latency, cluster.links[0].bandwidth) == (2.4e-6, 450e9)
    assert cluster.links[1] == H100.links[1]
    layer = work_of(MIXTRAL, LAYOUT, H100, kind="moe").layer
    found = timed(layer, MEASURED, WORK)
    before = {op.name: op.seconds for op in layer.operators}
    after = {op.name: op.seconds for op in found.operators}
    assert {name for name in after if after[name] != before[name]} == {"expert up", "dispatch"}
    assert [window.seconds for window in found.forward if window.name == "dispatch"] == [7e-4]
    assert [each.seconds for each in found.backward if each.name == "expert up backward"] == [2e-3]
    assert [op.bytes for op in found.operators] == [op.bytes for op in layer.operators]
    assert timed(replace(layer, name="dense"), MEASURED, WORK).operators == layer.operators


def test_gradients_of_weights_keep_their_part_of_a_measured_backward() -> None:
    work = work_of(MIXTRAL, LAYOUT, H100, kind="moe")
    found = timed_work(work, MEASURED, WORK)
    before = next(each.seconds for each in work.layer.backward if each.name == "expert up backward")
    part = work.weight_gradients["expert up backward"] / before
    assert 0 < part < 1
    assert found.weight_gradients["expert up backward"] == pytest.approx(part * 2e-3)
    assert found.weight_gradients["value backward"] == work.weight_gradients["value backward"]
    assert found.layer == timed(work.layer, MEASURED, WORK)


def test_drift_shows_the_largest_difference_first() -> None:
    layer = work_of(MIXTRAL, LAYOUT, H100, kind="moe").layer
    found = drift(layer, MEASURED, WORK)
    assert len(found) == 3
    differences = [abs(each.measured - each.predicted) for each in found]
    assert differences == sorted(differences, reverse=True)
    assert all(each.ratio == each.measured / each.predicted for each in found)
    assert {each.ratio for each in drift(timed(layer, MEASURED, WORK), MEASURED, WORK)} == {1.0}


def test_times_of_other_work_are_refused() -> None:
    layer = work_of(MIXTRAL, LAYOUT, H100, kind="moe").layer
    other = fingerprint(MIXTRAL, replace(LAYOUT, seq_len=2048), UNIFORM)
    assert other != WORK
    assert fingerprint(MIXTRAL, replace(LAYOUT, data=16, pipeline=4), UNIFORM) == WORK
    with pytest.raises(ValueError, match=r"calibration: layers\.moe: measured on other work"):
        timed(layer, MEASURED, other)
    odd = replace(MEASURED, layers={"moe": LayerTimes(work=WORK, seconds={"expert pu": 1.0})})
    with pytest.raises(ValueError, match="no part is called 'expert pu'; did you mean expert up"):
        timed(layer, odd, WORK)
    with pytest.raises(
        ValueError, match="calibration: links of h100-nvlink8-ib: 'nvlnk' is not known; did you mean nvl"
    ):
        calibrated(H100, Calibration(links={"nvlnk": {}}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"version": 2}, "c.yaml: version: 2 is not read here; use 1, measured anew"),
        ({"version": 1, "efficency": {}}, "c.yaml: unknown key 'efficency'; did you mean efficiency?"),
        ({"version": 1, "efficiency": {"matmul": 2}}, "c.yaml: efficiency.matmul: 2 is no part of 1"),
        ({"version": 1, "links": {"a": {"latency": 3}}}, "c.yaml: links.a.latency: 3 has no unit"),
        ({"version": 1, "layers": {"moe": {"seconds": {"up": 3}}}}, "c.yaml: layers.moe.up: 3 has no unit"),
        ({"version": 1, "device": {"peak": {"bf16": 3}}}, "c.yaml: device.peak.bf16: 3 has no unit"),
        ({"version": 1, "samples": {"a": [1]}}, "c.yaml: samples: no lists of [bytes, seconds] by name"),
        ([], "c.yaml: [] is no mapping; its keys are version, machine"),
    ],
)
def test_wrong_calibrations_are_one_line(given, message) -> None:
    with pytest.raises(ValueError) as caught:
        calibration_from(given, "c.yaml")
    assert str(caught.value).startswith(message)
