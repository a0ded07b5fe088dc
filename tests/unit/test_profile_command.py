"""`wastenot profile`: from seconds to figures, a layer in stages that computes what the layer does, and its file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from wastenot.launch.config import TrainConfig
from wastenot.launch.env import Rank
from wastenot.launch.planner_input import from_config
from wastenot.launch.settings import parse_config
from wastenot.moe.layer import MoELayer
from wastenot.parallel.lynx.calibration import (
    Calibration,
    LayerTimes,
    calibrated,
    fingerprint,
    read_calibration,
    timed_work,
    write_calibration,
)
from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.layout import Group
from wastenot.parallel.lynx.routing_skew import UNIFORM, Skew
from wastenot.parallel.lynx.traffic import (
    all_reduce_bytes,
    all_reduce_seconds,
    all_to_all_bytes,
    all_to_all_seconds,
    reduce_scatter_bytes,
    reduce_scatter_seconds,
    send_seconds,
)
from wastenot.parallel.lynx.work import work_of
from wastenot.parallel.mesh import single
from wastenot.tools.cli import main
from wastenot.tools.profile_machine import command
from wastenot.tools.profile_machine.device import figures
from wastenot.tools.profile_machine.fit import LEAST_SPEED, fit_line, fit_link, speed_under
from wastenot.tools.profile_machine.job import Effort, Job, config_of, layers_to_time
from wastenot.tools.profile_machine.kernels import Kernel
from wastenot.tools.profile_machine.layer import TimedLayer, Waits, by_names, slowest, typical
from wastenot.tools.profile_machine.links import steps
from wastenot.tools.profile_machine.rank import Measurement
from wastenot.tools.profile_machine.show import show

CPU = read_cluster("cpu-gloo")
TINY = """
model: {d_model: 32, layers: 2, heads: 4, kv_heads: 2, d_ff: 48, qk_norm: head,
  moe: {experts: 4, d_expert: 16, every: 2, shared_experts: 1}}
router: {kind: uniform, top_k: 2, balance_loss: 0.0}
data: {seq_len: 16, tokenizer: bytes}
train: {batch: 4}
"""


def config(**train: str) -> TrainConfig:
    given = yaml.safe_load(TINY)
    return parse_config({**given, "train": {**given["train"], **train}}, "tiny.yaml")


def job(output: Path, run: TrainConfig) -> Job:
    given = from_config(run, "tiny")
    return Job(
        shape=given.shape,
        layout=given.layout,
        skew=given.skew,
        cluster=CPU,
        config=run,
        output=output,
        effort=Effort(is_quick=True, kernels_s=0.3, layer_s=0.1, rounds=2),
        as_json=True,
        command="wastenot simulate tiny",
    )


def test_a_line_is_found_from_its_points() -> None:
    start, slope = fit_line([(size, 1e-4 + 2e-9 * size) for size in (1e3, 1e5, 1e7)])
    assert (start, slope) == (pytest.approx(1e-4), pytest.approx(2e-9))


def test_a_line_through_noise_is_neither_early_nor_falling() -> None:
    assert fit_line([(1e3, 2e-4), (1e6, 1e-4)]) == (pytest.approx(1.5e-4), 0.0)
    start, slope = fit_line([(1e6, 1e-3), (2e6, 2.1e-3), (4e6, 4.3e-3)])
    assert start > 0
    assert slope > 0


def test_a_link_measured_as_the_cost_model_says_predicts_the_same() -> None:
    group, spans, sizes = Group(4), (4,), (2**12, 2**18, 2**24)
    samples = {
        "all-to-all": [
            (all_to_all_bytes(spans, size)[0], all_to_all_seconds(CPU, group, (*all_to_all_bytes(spans, size), 0)))
            for size in sizes
        ],
        "all-reduce": [(all_reduce_bytes(spans, size)[0], all_reduce_seconds(CPU, group, size)) for size in sizes],
        "all-gather": [
            (reduce_scatter_bytes(spans, size)[0], reduce_scatter_seconds(CPU, group, size)) for size in sizes
        ],
        "send and receive": [(size, send_seconds(CPU, 1, size)) for size in sizes],
    }
    link, found = CPU.links[0], fit_link(samples, steps(4))
    assert found.latency == pytest.approx(link.latency)
    assert found.bandwidth * found.collective == pytest.approx(link.bandwidth * link.collective)
    assert found.bandwidth * found.all_to_all == pytest.approx(link.bandwidth * link.all_to_all)


@pytest.mark.parametrize(("both", "speed"), [(2.0, 0.5), (2.6, LEAST_SPEED), (1.4, 1.0)])
def test_speed_beside_an_exchange_is_what_it_hides_of_compute(both: float, speed: float) -> None:
    assert speed_under(exchange=1.0, compute=1.5, both=both) == pytest.approx(speed)


def test_efficiencies_are_parts_of_measured_peaks_and_give_the_seconds_back() -> None:
    def kernel(name: str, belongs: str, work: float, **more) -> Kernel:
        return Kernel(name=name, belongs=belongs, work=work, run=lambda: None, **more)

    found = [
        kernel("peak fp32", "peak", 1e9),
        kernel("copy", "bandwidth", 1e9),
        kernel("empty product", "launch", 0),
        kernel("up", "matmul", 1e8, occurs=3),
        kernel("down", "matmul", 2e8),
        kernel("experts", "grouped", 1e8, less=("activation",)),
        kernel("activation", "none", 1e6),
        kernel("norm", "memory", 4e8),
    ]
    seconds = {"peak fp32": 0.01, "copy": 0.1, "empty product": 1e-5, "activation": 0.01, "norm": 0.02 + 1e-5}
    seconds |= {"up": 0.002 + 1e-5, "down": 0.004 + 1e-5, "experts": 0.02 + 1e-5}
    made = figures(found, seconds, "fp32")
    assert made.launch == 1e-5
    assert made.peak == {"fp32": pytest.approx(1e11)}
    assert made.efficiency["matmul"] == pytest.approx(0.5)
    assert made.efficiency["grouped"] == pytest.approx(0.1)
    # Operands in a cache are faster than the large copy: then that is no peak.
    assert (made.bandwidth, made.efficiency["memory"]) == (pytest.approx(2e10), pytest.approx(1.0))
    assert "attention" not in made.efficiency


def test_a_pass_is_the_slowest_ranks_between_exchanges_that_nobody_waited_before() -> None:
    one = [("norm 1", 5.0), ("routing", 1.0), ("counts", 9.0), ("dispatch", 4.0), ("experts", 2.0)]
    other = [("norm 1", 7.0), ("routing", 3.0), ("counts", 2.0), ("dispatch", 1.0), ("experts", 8.0)]
    expected = {"norm 1": 7.0, "routing": 3.0, "counts": 2.0, "dispatch": 1.0, "experts": 8.0}
    assert slowest([one, other]) == expected


def test_typical_seconds_add_up_to_a_typical_pass() -> None:
    # One stage of each pass is disturbed, each time another.
    passes = [{"a": 1.0, "b": 1.0, "c": 4.0}, {"a": 4.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 4.0, "c": 1.0}]
    assert typical(passes) == {"a": 2.0, "b": 2.0, "c": 2.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_layer_in_stages_computes_what_its_block_does(kind, precision: str, one_thread, tmp_path: Path) -> None:
    run = config(precision=precision)
    timed = TimedLayer(config_of(job(tmp_path, run)), kind, UNIFORM, single(recorder=Waits()), 0)
    block = timed.block
    if isinstance(block.ffn, MoELayer):
        # The stages' gate has a gradient, a forced router's none: without weights it reaches no token.
        torch.nn.init.zeros_(block.ffn.router.weight)
    timed.run()
    staged = {name: weight.grad.clone() for name, weight in block.named_parameters() if weight.grad is not None}
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y_BSD, _ = block(timed.x_BSD, timed.table)
    y_BSD.backward(timed.grad_BSD)
    whole = {name: weight.grad for name, weight in block.named_parameters() if weight.grad is not None}
    assert len(whole) == len(staged) > 8
    for name, grad in whole.items():
        if name != "ffn.router.weight":
            assert grad.any(), name
            # In bf16 the order of sums shows.
            rtol = 1e-5 if precision == "fp32" else 1e-2
            torch.testing.assert_close(staged[name], grad, rtol=rtol, atol=rtol * float(grad.abs().max()))
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_operator_of_a_layer_is_timed_under_its_name(kind, one_thread, tmp_path: Path) -> None:
    this = job(tmp_path, config())
    layer = work_of(this.shape, this.layout, CPU, UNIFORM, kind).layer
    stages = dict(TimedLayer(config_of(this), kind, UNIFORM, single(recorder=Waits()), 0).run())
    found = by_names(stages, layer)
    assert set(found) == {each.name for each in (*layer.operators, *layer.backward)} - {"input"}
    assert sum(found.values()) == pytest.approx(sum(stages.values()))


def test_exchanges_have_the_names_of_windows_and_gradients_go_on_to_the_next_operator(tmp_path: Path) -> None:
    this = job(tmp_path, config())
    layout = replace(this.layout, expert=2, data=2)
    layer = work_of(this.shape, layout, CPU, UNIFORM, "moe").layer
    stages = {"norm 2": 1.0, "routing": 2.0, "counts": 0.5, "dispatch": 4.0, "experts": 8.0, "odd": 0.25}
    stages |= {"residual 2 backward": 0.5, "weighted sum backward": 1.0, "experts backward": 16.0}
    stages |= {"dispatch backward": 3.0, "routing backward": 0.5, "router backward": 1.0}
    found = by_names(stages, layer)
    assert (found["routing"], found["dispatch"], found["dispatch gradient"]) == (2.0, 4.5, 3.0)
    assert (found["weighted sum backward"], found["router backward"]) == (1.5, 1.5)
    parts = ["expert up", "expert activation", "expert down"]
    assert sum(found[part] for part in parts) == pytest.approx(8.25)
    assert sum(found[f"{part} backward"] for part in parts) == pytest.approx(16.0)
    # Three times as many weights in two halves and one.
    assert found["expert up"] > found["expert down"] > found["expert activation"] > 0
    assert set(found) <= {each.name for each in (*layer.operators, *layer.forward, *layer.backward)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"config": None},
            "dense, moe: not measured, its operators are predicted: the configuration is a model's shape",
        ),
        (
            {"memory": 1e3},
            "dense, moe: not measured, its operators are predicted: 0.0 GiB of weights and gradients are",
        ),
        ({"expert": 4}, "moe: not measured, its operators are predicted: 4 expert-parallel ranks do not fit the 2"),
        (
            {"skew": Skew(name="recorded:x", counts=(1.0,) * 4)},
            "moe: not measured, its operators are predicted: no router",
        ),
    ],
)
def test_what_cannot_be_timed_is_said(changes, reason: str, tmp_path: Path) -> None:
    this = job(tmp_path, config())
    memory = changes.pop("memory", 1e9)
    if "expert" in changes:
        changes = {"layout": replace(this.layout, data=4, expert=changes["expert"])}
    found, notes = layers_to_time(replace(this, **changes), 2, memory)
    left, _, why = reason.partition(": ")
    assert [kind for kind in ("dense", "moe") if kind not in found] == left.split(", ")
    assert len(notes) == len(left.split(", "))
    assert notes[-1].startswith(f"layers.moe: {why}")


def test_one_rank_measures_what_the_planner_reads(one_thread, tmp_path: Path, capsys) -> None:
    this = job(tmp_path / "calib.yaml", config())
    told: list[str] = []
    found = Measurement(this, Rank(), torch.device("cpu"), told.append).run()
    write_calibration(found, this.output)
    assert read_calibration(this.output) == found
    assert len(told) == 3
    assert set(found.efficiency) == {"matmul", "grouped", "attention", "attention_backward", "memory"}
    assert all(0 < part <= 1 for part in found.efficiency.values())
    assert "links: not measured: one rank has none; use --nproc 2" in found.notes
    cluster, same = calibrated(CPU, found), fingerprint(this.shape, this.layout, this.skew)
    assert cluster.device.peak == {**CPU.device.peak, **found.peak}
    for kind in ("dense", "moe"):
        work = timed_work(work_of(this.shape, this.layout, cluster, this.skew, kind), found, same)
        whole = work.forward + work.backward
        assert whole == pytest.approx(sum(found.layers[kind].seconds.values()))
        assert 0 < sum(work.weight_gradients.values()) < work.backward
    show(found, this)
    printed = json.loads(capsys.readouterr().out)
    documented = re.findall(r"^    ([a-z, ]+?)  +\S", str(command.__doc__), re.M)
    assert set(printed) == {key for keys in documented for key in keys.split(", ")}
    show(replace(found, layers={"moe": LayerTimes(work=same, seconds={"norm 1": 1e-3})}), replace(this, as_json=False))
    assert "a moe layer: 1 ms, most of it in norm 1 1 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny.yaml", "-o", "notes.txt"], "notes.txt exists and is not a calibration ("),
        (["tiny.yaml", "-o", "tiny.yaml"], "tiny.yaml exists and is not a calibration (tiny.yaml: unknown key"),
        (["tiny.yaml", "-o", "no/c.yaml"], "no/c.yaml: there is no folder no; make it"),
        (["tiny.yaml", "--nproc", "0"], "--nproc: 0 ranks measure nothing; use 1 or more"),
        (["tinny.yaml"], "model: no file and no model is called 'tinny.yaml'"),
        (["tiny.yaml", "--cluster", "cpu-glo"], "cluster: "),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    Path("notes.txt").write_text("do not lose this")
    assert main(["profile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert Path("notes.txt").read_text() == "do not lose this"


def test_the_command_starts_ranks_and_the_planner_reads_their_file(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "QUICK", Effort(is_quick=True, kernels_s=0.2, layer_s=0.1, rounds=2))
    Path("tiny.yaml").write_text(TINY)
    assert main(["profile", "tiny.yaml", "--nproc", "1", "--quick", "--json"]) == 0
    out, err = capfd.readouterr()
    printed = json.loads(out)
    assert "matrix products, attention, memory; 1 rank" in err
    assert printed["command"] == "wastenot simulate tiny.yaml --devices 1 --cluster cpu-gloo --calibration calib.yaml"
    assert printed["device"] == read_calibration("calib.yaml").device
    assert main([*printed["command"].split()[1:], "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["question"]["calibrated"] is True


def test_a_calibration_may_be_measured_anew(tmp_path: Path) -> None:
    write_calibration(Calibration(machine="before"), tmp_path / "c.yaml")
    command.check_file(tmp_path / "c.yaml")
