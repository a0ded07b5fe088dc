"""Runs that DeepSpeed trains: the numbers of the native engine, checkpoints of its own, and what they become."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
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

COPIED = {"expert": 1, "data": 2}
BROKEN = 3
"""The step whose loss is not finite, where a run is to have one."""


def train_all(rank: int, world: int, runs: list[Path], broken: bool = False) -> list[dict[str, Tensor]]:
    """Runs as `wastenot train` makes them, on ranks that are there; the weights that this rank has at their ends."""
    # DeepSpeed's own imports and calls.
    warnings.simplefilter("ignore")
    return [train(rank, world, path, broken) for path in runs]


def train(rank: int, world: int, path: Path, broken: bool) -> dict[str, Tensor]:
    config = load_config(path)
    place = Rank(rank=rank, world=world, local_rank=rank, local_world=world)
    ledger, watchdog = Ledger(), Watchdog(place, None, 60.0)
    mesh = make_mesh(config.parallel, "cpu", Recorders(ledger, watchdog))
    console = RunConsole(speaks=False)
    trainer = Trainer(config, mesh, prepare(config.data), console=console, ledger=ledger, watchdog=watchdog)
    model = trainer.engine.model if config.engine == "native" else trainer.engine.decoder  # pyright: ignore
    assert isinstance(model, nn.Module)

    def spoil(module: nn.Module, given: object, made: Tensor) -> Tensor | None:
        return made * math.nan if broken and module.training and trainer.progress.step == BROKEN - 1 else None

    model.embedding.register_forward_hook(spoil)  # pyright: ignore
    trainer.run()
    if config.engine == "native" or config.deepspeed.zero < 3:
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


def assert_same_curve(path: Path, native: Path, rel: float) -> None:
    found, expected = losses(path), losses(native)
    assert list(found) == list(expected) == list(range(1, 9))
    for step, numbers in expected.items():
        # What is not finite is null in a line of metrics.
        assert found[step] == (numbers if None in numbers else pytest.approx(numbers, rel=rel)), step
    assert summary(path)["val_loss"] == pytest.approx(summary(native)["val_loss"], rel=rel)
    for number in ("skipped_steps", "rectified_ratio", "parameters"):
        assert summary(path)[number] == summary(native)[number], number


@pytest.fixture(scope="module")
def trained(run) -> dict[int, tuple[Path, list[dict[str, Tensor]]]]:
    """A run of every stage of ZeRO and each rank's weights at its end; the native runs as stages -1, and -3 for 3.

    Experts are over two ranks and there twice, so that dense and expert gradients are sums over other ranks.
    """
    # Of 4096 numbers: some weights share one, some are larger.
    split, buckets = {"train": {"accumulate": 2}}, {"bucket_bytes": 16384}
    spread = {"parallel": {"data": 4, **buckets}, **split}
    whole = {"parallel": COPIED | buckets, "model": {"tie_embeddings": True}, **split}
    four = {-1: run(**spread), **{zero: run(zero, **spread) for zero in (0, 1, 2)}}
    two = {-3: run(**whole), 3: run(3, **whole)}
    found = {}
    for world, runs in ((4, four), (2, two)):
        weights = run_ranks(world, train_all, list(runs.values()), True, timeout=300)
        found |= {stage: (path, [rank[i] for rank in weights]) for i, (stage, path) in enumerate(runs.items())}
    return found


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_stage_has_the_losses_and_norms_of_the_native_engine(trained, zero):
    path, native = trained[zero][0], trained[-3 if zero == 3 else -1][0]
    assert_same_curve(path, native, 1e-5)
    assert losses(path)[BROKEN][0] is None
    assert summary(path)["skipped_steps"] == 1
    said = json.loads((log_dir(path) / "deepspeed.json").read_text())
    assert (said["zero_optimization"]["stage"], said["train_micro_batch_size_per_gpu"]) == (zero, 2 if zero == 3 else 1)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_converted_run_has_the_weights_that_trained_bit_for_bit(trained, zero, tmp_path, capsys):
    path, (first, second, *_) = trained[zero]
    target = tmp_path / "converted"
    assert main(["convert", "from-deepspeed", str(log_dir(path)), str(target)]) == 0
    assert "deepspeed" not in sys.modules, "a machine without it can read them"
    saved = open_run(target)
    found = saved.model.state_dict()
    assert found.keys() == first.keys()
    for name, tensor in found.items():
        shared = ".experts." in name and zero < 3
        assert torch.equal(tensor, torch.cat([first[name], second[name]]) if shared else first[name]), name
    capsys.readouterr()
    assert main(["eval", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(summary(path)["val_loss"], rel=1e-6)
    assert main(["eval", str(log_dir(path))]) == 2
    assert "wastenot convert from-deepspeed" in capsys.readouterr().err


def cut_short(path: Path, run: Callable[..., Path]) -> Path:
    """The run at `path` as it is when it is killed while it saves for the second time."""
    again = run()
    settings = yaml.safe_load(path.read_text()) | {"log": yaml.safe_load(again.read_text())["log"]}
    again.write_text(yaml.safe_dump(settings))
    shutil.copytree(log_dir(path), log_dir(again))
    folder = log_dir(again) / "checkpoints"
    (folder / "step-00000008").rename(folder / ".partial-step-00000008")
    (log_dir(again) / "metrics.jsonl").unlink()
    return again


def assert_went_on(again: Path, path: Path) -> None:
    before = losses(path)
    assert losses(again) == {step: before[step] for step in range(5, 9)}
    folders = sorted(each.name for each in (log_dir(again) / "checkpoints").iterdir() if each.is_dir())
    assert folders == ["step-00000004", "step-00000008"]


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained, run):
    for world, stages in ((4, (0, 1)), (2, (3,))):
        cut = [cut_short(trained[zero][0], run) for zero in stages]
        weights = run_ranks(world, train_all, cut, True, timeout=300)
        for i, zero in enumerate(stages):
            path, before = trained[zero]
            assert_went_on(cut[i], path)
            for rank, tensors in enumerate(weights):
                assert all(torch.equal(tensor, before[rank][name]) for name, tensor in tensors[i].items()), zero


def test_bf16_and_adapprox_train_as_natively(run):
    bf16, adapprox = {"train": {"precision": "bf16"}}, {"optimizer": {"name": "adapprox"}}
    copied = {"parallel": COPIED, **adapprox}
    native = [run(**bf16), run(**adapprox), run(**copied)]
    theirs = [run(1, **bf16), *(run(zero, **adapprox) for zero in (0, 1, 2)), run(3, **copied)]
    run_ranks(2, train_all, [*native, *theirs], timeout=300)
    # bf16 makes much of the last bits of fp32: sums in another order.
    assert_same_curve(theirs[0], native[0], 2e-3)
    for path in theirs[1:4]:
        assert_same_curve(path, native[1], 1e-5)
    assert_same_curve(theirs[4], native[2], 1e-5)
    cut = [cut_short(path, run) for path in (theirs[2], theirs[4])]
    run_ranks(2, train_all, cut, timeout=300)
    assert_went_on(cut[0], theirs[2])
    assert_went_on(cut[1], theirs[4])


def test_a_rank_alone_trains_and_the_console_is_ours(run):
    path = run(1, parallel={"expert": 1, "data": 1})
    said = finish(start(path))
    assert "trained          8 steps" in said
    assert not [line for line in said.splitlines() if "WARNING" in line or "Warning" in line or "eepSpeed" in line]


def test_what_cannot_be_is_one_line(trained, run, tmp_path, capsys):
    theirs, ours = (log_dir(trained[stage][0]) for stage in (1, -1))

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
    runs = [run(2, checkpoint={"resume": str(theirs)}), run(1, checkpoint={"resume": str(ours)})]
    [(other_layout, native), _] = run_ranks(2, refusals, runs)
    assert "world 4, not 2, data 4, not 2, zero 1, not 2: DeepSpeed resumes in the same layout" in other_layout
    assert f"{ours} holds checkpoints of engine: native, not of DeepSpeed" in native
