"""Runs that DeepSpeed trains: the numbers of the native engine, checkpoints of its own, and what they become."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from real_runs import finish, log_dir, losses, start, summary
from spawned import run_ranks
from torch import Tensor, nn

from wastenot.launch.console import RunConsole
from wastenot.launch.corpus import prepare
from wastenot.launch.engine_config import what_is_missing
from wastenot.launch.env import Rank
from wastenot.launch.errors import UserError
from wastenot.launch.saved_run import open_run
from wastenot.launch.settings import load_config
from wastenot.launch.trainer import Trainer
from wastenot.launch.watchdog import Watchdog
from wastenot.moe.ledger import Ledger
from wastenot.parallel.events import Recorders
from wastenot.parallel.mesh import make_mesh
from wastenot.tools.cli import main

pytestmark = pytest.mark.skipif(bool(what_is_missing("deepspeed")), reason=what_is_missing("deepspeed"))

BROKEN = 3
"""The step whose loss is not finite, in every run."""


def train_all(rank: int, world: int, runs: list[Path | tuple[Path, Path]]) -> list[dict[str, Tensor]]:
    """Runs as `wastenot train` makes them, on ranks that are there; the weights that this rank has at their ends.

    A pair is a run that was made, and another, which goes on from the middle of it.
    """
    # DeepSpeed's own imports and calls.
    warnings.simplefilter("ignore")
    weights = []
    for run in runs:
        if isinstance(run, tuple):
            if rank == 0:
                leave_half(*run)
            dist.barrier()
        weights.append(train(rank, world, run if isinstance(run, Path) else run[1]))
    return weights


def leave_half(path: Path, again: Path) -> None:
    """Leaves of the run at `path` in `again` what there is when it is killed while it saves for the second time."""
    settings = yaml.safe_load(path.read_text()) | {"log": yaml.safe_load(again.read_text())["log"]}
    again.write_text(yaml.safe_dump(settings))
    shutil.copytree(log_dir(path), log_dir(again))
    folder = log_dir(again) / "checkpoints"
    (folder / "step-00000008").rename(folder / ".partial-step-00000008")
    (log_dir(again) / "metrics.jsonl").unlink()


def train(rank: int, world: int, path: Path) -> dict[str, Tensor]:
    config = load_config(path)
    place = Rank(rank=rank, world=world, local_rank=rank, local_world=world)
    ledger, watchdog = Ledger(), Watchdog(place, None, 60.0)
    mesh = make_mesh(config.parallel, "cpu", Recorders(ledger, watchdog))
    console = RunConsole(speaks=False)
    trainer = Trainer(config, mesh, prepare(config.data), console=console, ledger=ledger, watchdog=watchdog)
    model = trainer.engine.model if config.engine == "native" else trainer.engine.decoder  # pyright: ignore
    assert isinstance(model, nn.Module)

    def spoil(module: nn.Module, given: object, made: Tensor) -> Tensor | None:
        return made * math.nan if module.training and trainer.progress.step == BROKEN - 1 else None

    model.embedding.register_forward_hook(spoil)  # pyright: ignore
    trainer.run()
    if config.deepspeed.zero < 3:
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def refusals(rank: int, world: int, runs: list[Path]) -> list[str]:
    """Why each of `runs` does not begin."""
    found = []
    for path in runs:
        with pytest.raises(UserError) as caught:
            train_all(rank, world, [path])
        found.append(str(caught.value))
    return found


@pytest.fixture(scope="module")
def run(made):
    """Writes the configuration of a short run: run(zero, **changes) -> path; zero: ZeRO's stage, or None for native."""

    def write(zero: int | None = None, json: str | None = None, **changes: object) -> Path:
        train, checkpoint = changes.pop("train", {}), changes.pop("checkpoint", {})
        path = made(
            train={"steps": 8, "eval_every": 0, "sample_tokens": 2, **train},  # type: ignore[dict-item]
            checkpoint={"every": 4, "keep": 2, **checkpoint},  # type: ignore[dict-item]
            **changes,
        )
        settings = yaml.safe_load(path.read_text())
        if zero is not None:
            settings |= {"engine": "deepspeed", "deepspeed": {"zero": zero, "json": json}}
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory) -> dict[str, tuple[Path, list[dict[str, Tensor]]]]:
    """Runs by name, and each rank's weights at their ends."""
    # Without it ZeRO 3 would never release weights as small as these.
    released = tmp_path_factory.mktemp("json") / "released.json"
    released.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    more = {"train": {"accumulate": 2}, "router": {"bias_update": 1e-3}}
    # Buckets of 4096 numbers: some weights share one, some are larger.
    buckets, copied = {"bucket_bytes": 16384}, {"expert": 1, "data": 2}
    # Experts over two ranks and there twice, so that dense and expert gradients are sums over other ranks.
    spread = {"parallel": {"data": 4, **buckets}, **more}
    tied = {"parallel": {**copied, **buckets}, "model": {"tie_embeddings": True}, **more}
    bf16, adapprox = {"train": {"precision": "bf16"}}, {"optimizer": {"name": "adapprox"}}
    four = {"native": run(**spread), **{f"zero {zero}": run(zero, **spread) for zero in (0, 1, 2)}}
    first = run(**adapprox)
    begun = {"train": {"start": str(log_dir(first))}}
    two = {
        "native, tied": run(**tied),
        "zero 3": run(3, str(released), **tied),
        "native, bf16": run(**bf16),
        "zero 1, bf16": run(1, **bf16),
        "zero 1, bf16, recomputed": run(1, recompute={"mode": "full"}, **bf16),
        "native, adapprox": first,
        **{f"zero {zero}, adapprox": run(zero, **adapprox) for zero in (0, 1, 2)},
        "native, copied adapprox": run(parallel=copied, **adapprox),
        "zero 3, adapprox": run(3, str(released), parallel=copied, **adapprox),
        "native, begun": run(**begun),
        "zero 1, begun": run(1, **begun),
        "native, copied, begun": run(parallel=copied, **begun),
        "zero 3, begun": run(3, str(released), parallel=copied, **begun),
    }
    found = {}
    for world, runs, names in ((4, four, RESUMED[:2]), (2, two, RESUMED[2:])):
        runs |= {f"resumed {name}": (runs[name], run()) for name in names}
        weights = run_ranks(world, train_all, list(runs.values()), timeout=300)
        for i, (name, path) in enumerate(runs.items()):
            found[name] = path if isinstance(path, Path) else path[1], [rank[i] for rank in weights]
    return found


RESUMED = ("zero 0", "zero 1", "zero 3", "zero 1, adapprox", "zero 3, adapprox")


@pytest.mark.parametrize(
    ("name", "native", "rel"),
    [
        *((f"zero {zero}", "native", 1e-5) for zero in (0, 1, 2)),
        ("zero 3", "native, tied", 1e-5),
        # bf16 makes much of the last bits of fp32: sums in another order.
        ("zero 1, bf16", "native, bf16", 2e-3),
        *((f"zero {zero}, adapprox", "native, adapprox", 1e-5) for zero in (0, 1, 2)),
        ("zero 3, adapprox", "native, copied adapprox", 1e-5),
        ("zero 1, begun", "native, begun", 1e-5),
        ("zero 3, begun", "native, copied, begun", 1e-5),
    ],
)
def test_losses_and_gradient_norms_are_those_of_the_native_engine(trained, name, native, rel):
    (path, _), (other, _) = trained[name], trained[native]
    found, expected = losses(path), losses(other)
    assert list(found) == list(expected) == list(range(1, 9))
    for step, numbers in expected.items():
        # What is not finite is null in a line of metrics.
        assert found[step] == ((None, None) if step == BROKEN else pytest.approx(numbers, rel=rel)), step
    for value in ["val_loss", "start_val_loss"] if "begun" in name else ["val_loss"]:
        assert summary(path)[value] == pytest.approx(summary(other)[value], rel=rel), value
    assert summary(path)["skipped_steps"] == 1
    assert summary(path)["parameters"] == summary(other)["parameters"]
    assert summary(path)["rectified_ratio"] == pytest.approx(summary(other)["rectified_ratio"], abs=rel)


def test_a_run_begins_with_the_weights_of_another(trained):
    before, after = (summary(trained[name][0]) for name in ("native, adapprox", "zero 1, begun"))
    assert after["start_val_loss"] == pytest.approx(before["val_loss"], rel=1e-5)


def test_what_blocks_compute_again_changes_no_bit(trained):
    (path, weights), (kept, others) = trained["zero 1, bf16, recomputed"], trained["zero 1, bf16"]
    assert losses(path) == losses(kept)
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in others[0].items())
    lines = [json.loads(line) for line in (log_dir(path) / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("recompute_exposed_seconds", 0) for line in lines) > 0


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_converted_run_has_the_weights_that_trained_bit_for_bit(trained, zero, tmp_path, capsys, monkeypatch):
    path, (first, second, *_) = trained[f"zero {zero}"]
    target = tmp_path / "converted"
    # The run, or one of its checkpoints from where they are.
    monkeypatch.chdir(log_dir(path) / "checkpoints")
    source = str(log_dir(path)) if zero == 0 else "step-00000008"
    # A machine without it can read them: importing it fails now.
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert main(["convert", "from-deepspeed", source, str(target)]) == 0
    found = open_run(target).model.state_dict()
    assert found.keys() == first.keys()
    for name, tensor in found.items():
        shared = ".experts." in name and zero < 3
        assert torch.equal(tensor, torch.cat([first[name], second[name]]) if shared else first[name]), name
    capsys.readouterr()
    assert main(["eval", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(summary(path)["val_loss"], rel=1e-6)
    assert main(["eval", str(log_dir(path))]) == 2
    assert "wastenot convert from-deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained, name):
    (path, before), (again, after) = trained[name], trained[f"resumed {name}"]
    expected = losses(path)
    assert losses(again) == {step: expected[step] for step in range(5, 9)}
    folders = sorted(each.name for each in (log_dir(again) / "checkpoints").iterdir() if each.is_dir())
    assert folders == ["step-00000004", "step-00000008"]
    for ours, theirs in zip(after, before, strict=True):
        assert all(torch.equal(tensor, theirs[weight]) for weight, tensor in ours.items())


def test_a_rank_alone_trains_and_the_console_is_ours(run):
    path = run(1, parallel={"expert": 1, "data": 1})
    said = finish(start(path))
    assert "trained          8 steps" in said
    said_to_it = json.loads((log_dir(path) / "deepspeed.json").read_text())
    assert (said_to_it["zero_optimization"]["stage"], said_to_it["train_micro_batch_size_per_gpu"]) == (1, 8)
    assert not [line for line in said.splitlines() if "WARNING" in line or "Warning" in line or "eepSpeed" in line]


def test_what_cannot_be_is_one_line(trained, run, tmp_path, capsys):
    theirs = log_dir(trained["zero 1"][0])

    def refused(path: Path, *words: str) -> None:
        assert main(["train", str(path)]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said

    contradicting = tmp_path / "theirs.json"
    contradicting.write_text(
        '{"train_batch_size": 16, "zero_optimization": {"stage": "auto"}, "optimizer": {"type": "Adam"}}'
    )
    refused(run(3), "deepspeed.zero", "use 2, or parallel.expert: 1")
    refused(run(1, optimizer={"name": "muon"}), "deepspeed.zero: 1", "adamw")
    refused(
        run(1, json=str(contradicting)), "train_batch_size: 16 is not 8, which train.batch decides", "optimizer.name"
    )
    alone = {"parallel": {"expert": 1, "data": 1}}
    refused(run(checkpoint={"resume": str(theirs)}, **alone), f"wastenot convert from-deepspeed {theirs} NEW")


class Planted:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_a_run_cannot_go_on_from_is_one_line(trained, run, tmp_path, capsys):
    four, native, source = (log_dir(trained[name][0]) for name in ("zero 1", "native", "zero 1, bf16"))
    name, ran, copies = "zero_pp_rank_1_mp_rank_00_optim_states.pt", tmp_path / "ran", {}
    for what in ("planted", "damaged", "short", "missing", "headless"):
        copies[what] = shutil.copytree(source / "checkpoints" / "step-00000008", tmp_path / what)
        (file,) = (each for each in copies[what].glob("*optim_states.pt") if each.name.endswith(name))
        if what == "planted":
            torch.save({"optimizer_state_dict": Planted(ran)}, file)
        elif what == "damaged":
            file.write_bytes(b"\0" * file.stat().st_size)
        elif what == "short":
            file.write_bytes(file.read_bytes()[:-100])
        elif what == "missing":
            file.unlink()
        about = json.loads((copies[what] / "wastenot.json").read_text())
        if what == "planted":
            about["files"][file.name] = file.stat().st_size
        elif what == "headless":
            del about["files"]
        (copies[what] / "wastenot.json").write_text(json.dumps(about))

    def resuming(path: Path, theirs: object = None, **changes: Any) -> Path:
        file = None
        if theirs is not None:
            file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
            file.write_text(json.dumps(theirs))
        return run(1, file and str(file), checkpoint={"resume": str(path)}, train={"precision": "bf16"}, **changes)

    cases = {
        run(2, checkpoint={"resume": str(four)}): "world 4, not 2, data 4, not 2, zero 1, not 2: DeepSpeed resumes in",
        run(1, checkpoint={"resume": str(native)}): f"{native} holds checkpoints of engine: native, not of DeepSpeed",
        resuming(source, {"zero_optimization": {"round_robin_gradients": True}}): (
            "saved with zero_optimization.round_robin_gradients null, not true: DeepSpeed resumes in the same layout"
        ),
        resuming(source, {"zero_optimization": {"overlap_comm": "perhaps"}}): "DeepSpeed does not take what",
        resuming(source, model={"layers": 3}, router={"jitter": 0.0}): (
            "is of another model (model.layers: 2 -> 3; router.jitter: 0.05 -> 0.0)"
        ),
        resuming(copies["planted"]): "holds code, or is damaged; it was not loaded",
        resuming(copies["damaged"]): "holds code, or is damaged; it was not loaded",
        resuming(copies["short"]): "the checkpoint is not whole",
        resuming(copies["missing"]): f"{name} is missing; the checkpoint is not whole",
        resuming(copies["headless"]): "wastenot.json has no files",
    }
    for said in run_ranks(2, refusals, list(cases), timeout=300):
        for line, words in zip(said, cases.values(), strict=True):
            assert words in line
            assert "\n" not in line
    for what in ("short", "missing", "headless"):
        assert main(["convert", "from-deepspeed", str(copies[what]), str(tmp_path / "new")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    weights = copies["planted"] / "mp_rank_00_model_states.pt"
    for content in ({"module": Planted(ran)}, {"module": {}}, [1]):
        torch.save(content, weights)
        about = json.loads((copies["planted"] / "wastenot.json").read_text())
        about["files"][weights.name] = weights.stat().st_size
        (copies["planted"] / "wastenot.json").write_text(json.dumps(about))
        assert main(["convert", "from-deepspeed", str(copies["planted"]), str(tmp_path / "new")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not ran.exists()
