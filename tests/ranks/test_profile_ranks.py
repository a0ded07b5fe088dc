"""`wastenot profile` on real ranks: links by level, exchanges among a layer's operators, one file for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from spawned import run_ranks

from wastenot.launch.env import Rank
from wastenot.launch.planner_input import from_config
from wastenot.launch.settings import parse_config
from wastenot.parallel.lynx.calibration import Calibration, calibrated, fingerprint, timed_work
from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.work import work_of
from wastenot.tools.profile_machine.job import Effort, Job
from wastenot.tools.profile_machine.rank import Measurement

CONFIG = {
    "model": {"d_model": 32, "layers": 2, "heads": 4, "d_ff": 48, "moe": {"experts": 4, "d_expert": 16, "every": 2}},
    "router": {"top_k": 2},
    "parallel": {"expert": 2, "data": 4},
    "data": {"seq_len": 16, "tokenizer": "bytes"},
    "train": {"batch": 4},
}


def job() -> Job:
    """Four ranks, of which two at a time share a node."""
    config = parse_config(CONFIG, "tiny.yaml")
    given, cluster = from_config(config, "tiny"), read_cluster("cpu-gloo")
    inner, outer = cluster.links
    return Job(
        shape=given.shape,
        layout=given.layout,
        skew=given.skew,
        cluster=replace(cluster, links=(replace(inner, devices=2), outer)),
        config=config,
        output=Path("unused"),
        effort=Effort(is_quick=True, kernels_s=0.2, layer_s=0.1, rounds=2),
        as_json=False,
        command="",
    )


def measured(rank: int, world: int) -> Calibration:
    place = Rank(rank=rank, world=world, local_rank=rank, local_world=world, launcher="torchrun")
    # Uninitialised memory would be filled in every turn.
    torch.utils.deterministic.fill_uninitialized_memory = False
    return Measurement(job(), place, torch.device("cpu"), lambda text: None).run()


def test_ranks_measure_both_levels_and_every_exchange_of_a_layer() -> None:
    first, *others = run_ranks(4, measured, timeout=120.0)
    assert all((each.links, each.peak, each.layers) == (first.links, first.peak, first.layers) for each in others)
    this = job()
    assert set(first.links) == {"loopback", "ethernet"}
    collectives = {"all-to-all", "all-reduce", "all-gather", "send and receive"}
    assert set(first.samples) == {f"{link} {name}" for link in first.links for name in collectives}
    for link in first.links.values():
        assert set(link) == {"latency", "bandwidth", "collective", "all_to_all", "slowdown"}
        assert max(link["collective"], link["all_to_all"]) == 1.0
    cluster, same = calibrated(this.cluster, first), fingerprint(this.shape, this.layout, this.skew)
    for kind in ("dense", "moe"):
        work = timed_work(work_of(this.shape, this.layout, cluster, this.skew, kind), first, same)
        seconds = first.layers[kind].seconds
        assert {each.name for each in (*work.layer.operators, *work.layer.backward)} - {"input"} == set(seconds)
        whole = work.forward + work.backward + work.forward_exchange + work.backward_exchange
        assert whole == pytest.approx(sum(seconds.values()))
    assert {"dispatch", "combine", "dispatch gradient", "combine gradient"} <= set(first.layers["moe"].seconds)
