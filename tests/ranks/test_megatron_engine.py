"""Megatron-Core as the engine of whole runs, on real gloo ranks: what it measures is what the native engine does.

Megatron runs through `megatron_cpu_shim.py`, which patches its process for good: all runs are in ranks of their own,
one start of these for all that needs as many.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from real_runs import TRAIN
from spawned import run_ranks

from wastenot.launch.errors import UserError
from wastenot.launch.settings import parse_config

ROOT = Path(__file__).parents[2]

BASE: dict[str, Any] = {
    "model": {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "moe": {"experts": 4, "d_expert": 32}},
    "router": {"top_k": 2, "capacity_factor": 1.0, "rectify": {"intra": True, "fill": True}},
    "parallel": {"piece_bytes": 0},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 5},
    "data": {"tokenizer": "bytes", "seq_len": 32},
    "train": {"steps": 30, "batch": 8, "sample_tokens": 8},
    "checkpoint": {"every": 0},
    "log": {"every": 1, "tensorboard": False},
}
DROPLESS = {"capacity_factor": None, "rectify": {"intra": False, "fill": False}}

# What is changed, by ranks and by name; each is run by both engines.
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "EP 2, rectified": {"parallel": {"expert": 2}, "optimizer": {"name": "adapprox"}},
        "EP 1, dropless": {
            "parallel": {"data": 2},
            "router": DROPLESS | {"balance_over": "global", "z_loss": 0.01, "bias_update": 0.01},
            "train": {"accumulate": 2, "steps": 12},
        },
        "EP 2, our layer": {
            "parallel": {"expert": 2},
            "megatron": {"layer": "wastenot"},
            "model": {"moe": {"dispatch": "padded", "shared_experts": 1}},
            "router": {"rectify": {"capacity": 0.5}},
            "train": {"steps": 12},
        },
        "PP 2": {
            "parallel": {"pipeline": 2},
            "model": {"layers": 3, "qk_norm": "head", "moe": {"first_dense": 1, "shared_experts": 1}},
            "train": {"accumulate": 4},
            "checkpoint": {"every": 25},
        },
        "bf16": {"parallel": {"expert": 2}, "train": {"precision": "bf16", "steps": 12}},
    },
    4: {
        "EP 4": {
            "parallel": {"expert": 4},
            "router": {"top_k": 1, "jitter": 0.05, "balance_over": "sequence", "priority": "position"},
            "train": {"steps": 6},
        },
        "EP 2 x PP 2": {"parallel": {"expert": 2, "pipeline": 2}, "train": {"accumulate": 2, "steps": 6}},
    },
}


def changed(settings: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    for key, value in change.items():
        inner = isinstance(value, dict) and isinstance(settings.get(key), dict)
        settings[key] = changed(settings[key], value) if inner else value
    return settings


def train(rank: int, world: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run: lines of what it measured, and the text that it ended with."""
    from wastenot.launch.console import RunConsole
    from wastenot.launch.corpus import prepare
    from wastenot.launch.env import Rank
    from wastenot.launch.metrics import read_metrics
    from wastenot.launch.trainer import Trainer
    from wastenot.launch.watchdog import Watchdog
    from wastenot.moe.ledger import Ledger
    from wastenot.parallel.events import Recorders
    from wastenot.parallel.mesh import make_mesh

    config = parse_config(settings, "test")
    ledger, watchdog = Ledger(), Watchdog(Rank(rank=rank, world=world), None, 600.0)
    mesh = make_mesh(config.parallel, "cpu", Recorders(ledger, watchdog))
    data = prepare(config.data, progress=False)
    console = RunConsole(speaks=False)
    summary = Trainer(config, mesh, data, console=console, ledger=ledger, watchdog=watchdog).run()
    if summary is None:
        return {}
    return {"lines": list(read_metrics(Path(config.log.dir))), "summary": summary}


def everything(rank: int, world: int, settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """The runs of all cases under both engines, and goings-on from the checkpoint of one."""
    sys.path.append(str(ROOT / "tests"))  # where the shim lies, beside the folders of tests
    import megatron_cpu_shim

    megatron_cpu_shim.install()

    def run(name: str, change: dict[str, Any]) -> dict[str, Any]:
        with megatron_cpu_shim.devices_on_cpu():
            return train(rank, world, changed(settings, change | {"log": {"dir": f"{folder}/{world}/{name}"}}))

    results = {}
    for name, change in CASES[world].items():
        for engine in ("native", "megatron"):
            results[name, engine] = run(f"{name} {engine}", change | {"engine": engine})
    saved = CASES[world].get("PP 2")
    if saved is not None:
        for source, engine in (("megatron", "megatron"), ("megatron", "native"), ("native", "megatron")):
            path = f"{folder}/{world}/PP 2 {source}/checkpoints/step-00000025"
            again = changed(saved, {"engine": engine, "checkpoint": {"every": 0, "resume": path}})
            results[f"{source} then", engine] = run(f"{source} then {engine}", again)
        begun = {"engine": "megatron", "train": {"start": f"{folder}/{world}/PP 2 native", "steps": 5}}
        results["begun", "megatron"] = run("begun", changed(saved, begun))
    return results


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """By case and engine."""
    if importlib.util.find_spec("megatron") is None:  # Importing it takes seconds, and the ranks do.
        pytest.skip("needs megatron-core")
    folder = tmp_path_factory.mktemp("megatron")
    settings = changed(BASE, {"data": {"corpus": str(corpus), "dir": str(corpus.parent / "prepared")}})
    found = {}
    for world in CASES:
        found |= run_ranks(world, everything, settings, str(folder), timeout=240.0)[0]
    return found


# Megatron-Core warns about CUDA libraries that a CPU does not have.
pytestmark = pytest.mark.filterwarnings("ignore")

LOSSES, ROUTING = ("loss", "val_loss"), ("grad_norm", "balance_loss", "z_loss")


def numbers(
    result: dict[str, Any], names: tuple[str, ...] = LOSSES + ROUTING, first: int = 1
) -> list[tuple[float, ...]]:
    lines = [line for line in result["lines"] if "loss" in line or "val_loss" in line]
    return [tuple(line[key] for key in names if key in line) for line in lines if line["step"] >= first]


def off(found: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> float:
    """The largest relative difference of any number."""
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


CASES_BY_NAME = {name: change for cases in CASES.values() for name, change in cases.items()}


@pytest.mark.parametrize("case", [name for name in CASES_BY_NAME if name != "bf16"])
def test_it_is_the_native_run(results, case):
    """Losses to 1e-5, gradient norms (which spike) to 1e-4, and every slot of every layer, of all steps."""
    native, megatron = results[case, "native"], results[case, "megatron"]
    steps = CASES_BY_NAME[case].get("train", {}).get("steps", BASE["train"]["steps"])
    for names, bound in ((LOSSES, 1e-5), (ROUTING, 1e-4)):
        expected = numbers(native, names)
        assert len(expected) == steps + 1, "a line for each step, and one for the held-out text"
        assert off(numbers(megatron, names), expected) <= bound
    slots = [[line.get("slots") for line in result["lines"]] for result in (native, megatron)]
    assert slots[0] == slots[1]
    assert native["summary"].parameters == megatron["summary"].parameters
    assert native["summary"].sample == megatron["summary"].sample


def test_a_run_begins_with_the_weights_of_another(results):
    before, after = results["PP 2", "native"]["summary"], results["begun", "megatron"]["summary"]
    assert after.start_val_loss == pytest.approx(before.val_loss, rel=1e-5)


def test_rectified_slots_are_in_the_ledger(results):
    line = results["EP 2, rectified", "megatron"]["lines"][1]
    assert min(sum(line["slots"][kind]) for kind in ("kept", "filled", "rectified")) > 0


def test_only_our_layer_tells_the_ledger_of_its_exchange(results):
    """Megatron's dispatcher is not watched: the account of a run says nothing of what it does not know."""
    ours, theirs = (results[case, "megatron"]["lines"][1] for case in ("EP 2, our layer", "EP 2, rectified"))
    native = results["EP 2, our layer", "native"]["lines"][1]
    assert ours["sent_bytes_by_layer"] == native["sent_bytes_by_layer"]
    assert sum(theirs["sent_bytes_by_layer"]) == 0 < sum(ours["sent_bytes_by_layer"])


def test_bf16_goes_the_same_way(results):
    """Megatron computes norms and residuals in bf16, we in fp32: near, and not the same."""
    native, megatron = (numbers(results["bf16", engine]) for engine in ("native", "megatron"))
    assert native != megatron
    for (loss, *_), (expected, *_) in zip(megatron, native, strict=True):
        assert loss == pytest.approx(expected, rel=0.02)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(results):
    whole = numbers(results["PP 2", "megatron"], first=26)
    assert len(whole) == 6
    assert numbers(results["megatron then", "megatron"]) == whole


@pytest.mark.parametrize(("source", "engine"), [("megatron", "native"), ("native", "megatron")])
def test_a_run_goes_on_under_the_other_engine(results, source, engine):
    whole = numbers(results["PP 2", source], first=26)
    assert off(numbers(results[f"{source} then", engine]), whole) <= 1e-5


# What is set; the path that is named; what is offered instead.
BAD = [
    ({"model": {"qk_norm": "full"}}, "model.qk_norm", "use head or none"),
    ({"model": {"moe": {"dispatch": "padded"}}, "router": {"rectify": {}}}, "model.moe.dispatch", "use ragged"),
    ({"router": {"kind": "uniform", "balance_loss": 0.0}}, "router.kind", "use learned"),
    ({"train": {"precision": "fp64"}}, "train.precision", "use fp32"),
    ({"parallel": {"pipeline": 2, "schedule": "gpipe"}}, "parallel.schedule", "use 1f1b"),
    ({"parallel": {"tensor": 2}}, "parallel.tensor", "use 1"),
]


@pytest.mark.parametrize(("change", "path", "fix"), BAD, ids=[path for _, path, _ in BAD])
def test_what_megatron_cannot_be_told_is_refused_by_its_name(change, path, fix):
    with pytest.raises(UserError) as caught:
        parse_config(changed(BASE, change | {"engine": "megatron"}), "test")
    [line] = [line for line in str(caught.value).splitlines() if path in line]
    assert fix in line and "engine: native" in line


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a CUDA device, and it would train")
def test_without_cuda_one_line_says_so(tmp_path):
    path = tmp_path / "config.yaml"
    settings = changed(BASE, {"engine": "megatron", "log": {"dir": str(tmp_path / "run")}})
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = subprocess.run([*TRAIN, str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "CUDA" in line and "use native" in line
    assert not (tmp_path / "run").exists()
