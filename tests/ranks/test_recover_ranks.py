"""Recovery over ranks: distillation and training in part are those of one process, and a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from real_runs import finish, launch, log_dir, start
from spawned import run_ranks
from test_parallel_parity import CASES, config
from test_shard_ranks import full, mesh_of, state_of

from wastenot.kernels.distillation import naive
from wastenot.launch import teacher as teacher_module
from wastenot.launch.config import DistillConfig, TrainConfig
from wastenot.launch.errors import UserError
from wastenot.launch.freeze import freeze
from wastenot.launch.metrics import read_metrics
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.precision import compute_dtype, weight_dtype
from wastenot.launch.run_folder import RunFolder
from wastenot.launch.saved_run import find_checkpoint
from wastenot.launch.step import make_stepper
from wastenot.launch.teacher import Teacher, chosen_checkpoint
from wastenot.launch.zeros import keep_zeros
from wastenot.moe.config import dropless
from wastenot.moe.decoder import build_decoder
from wastenot.parallel import vocabulary, vocabulary_distillation
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import make_mesh
from wastenot.parallel.tensor import cut, local
from wastenot.tools.random_tokens import RandomTokens

ALONE = ParallelConfig()
DISTILL = DistillConfig(teacher="another run", weight=0.6, temperature=2.0)


def settings_for(name: str, only: str = "all", precision: str = "fp64") -> TrainConfig:
    """Two micro-batches a step, clipped; the second layer only attends, the third has fewer experts."""
    router, moe = CASES[name]
    settings = config(router, precision, **moe)
    assert settings.model.moe is not None
    less = replace(settings.model.moe, per_layer=(8, 0, 4, 0), dense=(3,))
    return replace(
        settings,
        model=replace(settings.model, layers=4, moe=less),
        optimizer=replace(settings.optimizer, clip_norm=0.1),
        train=replace(settings.train, steps=3, only=only),  # pyright: ignore[reportArgumentType]
    )


def train(rank: int, world: int, settings: TrainConfig, layout: ParallelConfig):
    """Losses, gradient norms and divergences of a few steps against a deeper teacher, and the weights after them."""
    mesh, precision = mesh_of(layout), settings.train.precision
    dtypes = {"dtype": weight_dtype(precision), "compute_dtype": compute_dtype(precision)}
    model = build_decoder(settings.model, settings.router, mesh, **dtypes)
    freeze(model, settings.train.only)
    optimizer = make_optimizer(model, settings.optimizer)
    if settings.train.keep_zeros:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".experts." in name:
                    local(weight).clamp_(min=0)
        keep_zeros(model, optimizer)
    teacher = None
    if settings.train.distill is not None:
        assert settings.model.moe is not None
        moe = replace(settings.model.moe, per_layer=(), dense=())
        deeper, router = dropless(replace(settings.model, layers=5, d_model=48, moe=moe), settings.router)
        taught = build_decoder(deeper, router, mesh, seed=1, **dtypes).requires_grad_(False)
        teacher = Teacher(taught.eval(), settings.train.distill, {})
    windows = RandomTokens(settings.model.vocab_size, settings.data.seq_len)
    gradients = Gradients(model, mesh, bucket_bytes=20_000)
    stepper = make_stepper(settings, mesh, model, optimizer, gradients, windows, teacher)  # pyright: ignore[reportArgumentType]
    before = {name: full(tensor).clone().numpy() for name, tensor in state_of(stepper, optimizer=False).items()}
    results = [stepper.step(i, i * settings.train.batch, stop=False) for i in range(settings.train.steps)]
    assert all(result.applied for result in results)
    curve = [(result.loss, result.grad_norm, result.auxiliary.get("divergence", 0.0)) for result in results]
    after = {name: full(tensor).numpy() for name, tensor in state_of(stepper, optimizer=False).items()}
    return curve, before, after


LAYOUTS = {
    "expert": ParallelConfig(expert=2),
    "data": ParallelConfig(data=2),
    "shard": ParallelConfig(shard=2),
    "shard and expert": ParallelConfig(shard=2, expert=2),
    "data, shard and expert": ParallelConfig(data=2, shard=2, expert=2),
}
TENSOR = {
    "tensor and expert": ParallelConfig(tensor=2, expert=2),
    "tensor and shard": ParallelConfig(tensor=2, shard=2),
}
"""Where the vocabulary is spread over ranks, too."""


@pytest.mark.parametrize("layout", [*LAYOUTS, *TENSOR])
def test_fp64_distillation_is_that_of_one_process(layout):
    # Emulated ranks drop what real ones would; the teacher drops nothing.
    for name in ("dropless with bias", "capacity") if layout in LAYOUTS else ("dropless",):
        settings = settings_for(name)
        settings = replace(settings, train=replace(settings.train, distill=DISTILL))
        expected, _, weights = train(0, 1, settings, ALONE)
        assert min(divergence for *_, divergence in expected) > 0.01
        ranks = {**LAYOUTS, **TENSOR}[layout]
        for curve, _, after in run_ranks(ranks.world(), train, settings, ranks):
            np.testing.assert_allclose(curve, expected, rtol=1e-9, atol=0, err_msg=name)
            for key, value in weights.items():
                np.testing.assert_allclose(after[key], value, rtol=1e-9, atol=1e-12, err_msg=key)


PARTS = {
    "router": lambda name: ".router.weight" in name,
    "norms": lambda name: name.endswith("norm.weight"),
    "stub": lambda name: name.startswith("model.blocks.3.ffn."),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, *TENSOR])
def test_fp64_training_of_a_part_is_that_of_one_process_and_leaves_the_rest(layout):
    ranks = {**LAYOUTS, **TENSOR}[layout]
    for only, learns in PARTS.items():
        settings = settings_for("dropless", only)
        expected, before, weights = train(0, 1, settings, ALONE)
        moved = {name for name, value in weights.items() if not np.array_equal(value, before[name])}
        assert moved == {name for name in weights if learns(name)} != set()
        for curve, _, after in run_ranks(ranks.world(), train, settings, ranks):
            np.testing.assert_allclose(curve, expected, rtol=1e-9, atol=0, err_msg=only)
            for key, value in weights.items():
                np.testing.assert_allclose(after[key], value, rtol=1e-9, atol=1e-12, err_msg=key)
                assert learns(key) or np.array_equal(after[key], value), key


@pytest.mark.parametrize("layout", ["expert", "shard", "data, shard and expert"])
def test_zeros_stay_under_every_layout(layout):
    settings = settings_for("dropless")
    settings = replace(settings, train=replace(settings.train, keep_zeros=True))
    expected, before, weights = train(0, 1, settings, ALONE)
    zeros = {name: value == 0 for name, value in before.items() if ".experts." in name}
    assert all(0.4 < each.mean() < 0.6 for each in zeros.values()) and len(zeros) == 4
    for curve, _, after in run_ranks(LAYOUTS[layout].world(), train, settings, LAYOUTS[layout]):
        np.testing.assert_allclose(curve, expected, rtol=1e-9, atol=0)
        assert all(np.array_equal(after[name] == 0, each) for name, each in zeros.items())
        for key, value in weights.items():
            np.testing.assert_allclose(after[key], value, rtol=1e-9, atol=1e-12, err_msg=key)


def spread_loss(rank: int, world: int, dtype: torch.dtype, chunk_bytes: int, scale: float, mix: float) -> None:
    vocabulary.CHUNK_BYTES = chunk_bytes
    torch.manual_seed(3)
    T, V = 7, 41
    sizes = (world * T, 12), (V, 12), (world * T, 5), (V, 5)
    hidden, weight, taught, taught_weight = (torch.randn(size).to(dtype) * scale for size in sizes)
    targets = torch.randint(0, V, (world * T,))
    targets[::5] = -100
    for learning in (hidden, weight):
        learning.requires_grad_()
    expected = naive.linear_distillation(hidden, weight, taught, taught_weight, targets, mix, 1.7)
    (expected[0] * 0.3).backward()
    mesh = make_mesh(ParallelConfig(tensor=world), "cpu")
    own = slice(rank * T, (rank + 1) * T)
    mine = hidden.detach()[own].clone().requires_grad_()
    rows, taught_rows = (torch.nn.Parameter(cut(whole.detach(), 0, mesh)) for whole in (weight, taught_weight))
    operands = mine, rows, taught[own], taught_rows.detach(), targets.view(world, T)
    parts = vocabulary_distillation.linear_distillation(*operands, mix, 1.7, mesh)
    (parts[0] * 0.3).backward()
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for part, whole in zip(parts, expected, strict=True):
        total = part.detach().clone()
        dist.all_reduce(total)
        assert total.dtype == whole.dtype
        torch.testing.assert_close(total, whole.detach(), rtol=near, atol=near)
    for grad, whole in ((mine.grad, hidden.grad[own]), (local(rows.grad), local(cut(weight.grad, 0, mesh)))):
        torch.testing.assert_close(grad, whole, rtol=near, atol=near * scale)
    with torch.no_grad():
        again = vocabulary_distillation.linear_distillation(*operands, mix, 1.7, mesh)
    assert all(one.equal(other.detach()) for one, other in zip(again, parts, strict=True))
    frozen = mine, rows.detach(), *operands[2:]
    [grad] = torch.autograd.grad(vocabulary_distillation.linear_distillation(*frozen, mix, 1.7, mesh)[0] * 0.3, mine)
    assert grad.equal(mine.grad)


@pytest.mark.parametrize("world", [2, 3])
def test_the_loss_over_spread_vocabularies_is_that_of_whole_ones(world):
    # A chunk of one token, of three, and all at once; logits far beyond what an exponential holds.
    for dtype, chunk_bytes, scale, mix in (
        (torch.float64, 1, 20.0, 0.4),
        (torch.float64, 3 * world * 21 * 8, 1.0, 1.0),
        (torch.float64, 2**20, 1.0, 0.0),
        (torch.float32, 2**20, 1.0, 0.4),
        (torch.bfloat16, 2**20, 1.0, 0.4),
    ):
        run_ranks(world, spread_loss, dtype, chunk_bytes, scale, mix)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_part_learns_the_same_where_backward_computes_again(mode):
    settings = settings_for("dropless", "router")
    settings = replace(settings, recompute=replace(settings.recompute, mode=mode))
    expected, *_ = train(0, 1, settings_for("dropless", "router"), ALONE)
    assert run_ranks(2, train, settings, LAYOUTS["expert"])[0][0] == pytest.approx(np.array(expected), rel=1e-9)


def test_bf16_distillation_is_close_to_fp32():
    curves = {}
    for precision in ("bf16", "fp32"):
        settings = settings_for("dropless", precision=precision)
        settings = replace(settings, train=replace(settings.train, distill=DISTILL))
        curves[precision] = np.array(train(0, 1, settings, ALONE)[0])
    np.testing.assert_allclose(curves["bf16"][:, 0], curves["fp32"][:, 0], rtol=5e-3)
    np.testing.assert_allclose(curves["bf16"][:, 2], curves["fp32"][:, 2], rtol=3e-2)
    assert not np.array_equal(curves["bf16"], curves["fp32"])


RECOVER = (sys.executable, "-m", "wastenot.tools.cli", "compress", "recover")


def test_a_recovery_that_is_killed_goes_on_bit_for_bit_over_ranks(made, tmp_path):
    """On two ranks that share experts; the teacher is what the run begins with."""
    dense = made(train={"steps": 5, "eval_every": 0, "sample_tokens": 0})
    finish(start(dense))
    arguments = ("--teacher", log_dir(dense), "--steps", "10", "-s", "checkpoint.every=3", "-s", "train.eval_every=0")
    finish(launch(*RECOVER, log_dir(dense), tmp_path / "whole", *arguments))
    process = launch(*RECOVER, log_dir(dense), tmp_path / "cut", *arguments)
    wait_for(tmp_path / "cut" / "checkpoints", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert "resumed from" in finish(launch(*RECOVER, log_dir(dense), tmp_path / "cut", *arguments))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    done, again = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    for name in ("val_loss", "start_val_loss", "teacher_val_loss"):
        assert again[name] == done[name]
    assert done["world"] == 2
    assert yaml.safe_load((tmp_path / "cut" / "config.yaml").read_text())["parallel"]["expert"] == 2


def wait_for(checkpoints: Path, process) -> None:
    while not any(checkpoints.glob("step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def curve(run: Path) -> list[tuple[float, ...]]:
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    return [(line["loss"], line["grad_norm"], line["divergence"]) for line in lines]


@pytest.fixture(scope="module")
def attending(made) -> Path:
    """A run of few steps whose second layer only attends."""
    model = {"d_model": 32, "layers": 2, "heads": 2, "moe": {"experts": 4, "d_expert": 32, "per_layer": [4, 0]}}
    train = {"steps": 4, "batch": 8, "sample_tokens": 0, "precision": "fp64"}
    path = made(model=model, train=train | {"eval_every": 0}, parallel={"expert": 1})
    router = {"top_k": 2, "balance_over": "global"}
    settings = yaml.safe_load(path.read_text()) | {"router": router, "schedule": {"warmup_steps": 0}}
    path.write_text(yaml.safe_dump(settings))
    finish(start(path))
    return log_dir(path)


def choice(rank: int, world: int, run: Path):
    """Of a teacher of which ranks but the first see a later checkpoint."""

    def found(folder: RunFolder, step: int | None) -> Path:
        return folder.checkpoints / "step-00000099" if rank else find_checkpoint(folder, step)

    with patch.object(teacher_module, "find_checkpoint", found):
        try:
            return chosen_checkpoint(RunFolder(run), mesh_of(ParallelConfig(data=world)))
        except UserError as error:
            return str(error)


def test_all_ranks_learn_from_the_checkpoint_that_the_first_one_finds(attending, tmp_path):
    one, other = run_ranks(2, choice, attending)
    manifest = (RunFolder(attending).checkpoints / "step-00000004" / "meta.json").read_bytes()
    print_of = hashlib.sha256(manifest).hexdigest()[:16]
    assert one == other == {"checkpoint": "step-00000004", "fingerprint": print_of}
    one, other = run_ranks(2, choice, tmp_path)
    assert one == other and "has no complete checkpoint" in one


def test_weights_stubs_and_teachers_are_laid_out_over_any_ranks(attending, tmp_path):
    found = {}
    for layout in ("data=1", "pipeline=2", "tensor=2", "shard=2"):
        teacher = () if layout == "pipeline=2" else ("--teacher", attending)
        words = ("--stub", "16", "--steps", "2", "-s", f"parallel.{layout}", "-s", "train.accumulate=2", *teacher)
        finish(launch(*RECOVER, attending, tmp_path / layout, *words))
        done = json.loads((tmp_path / layout / "summary.json").read_text())
        assert done["world"] == (1 if layout == "data=1" else 2)
        found[layout] = [done[name] for name in ("start_val_loss", "val_loss", "teacher_val_loss")]
    before = json.loads((attending / "summary.json").read_text())["val_loss"]
    assert found["data=1"][0] == pytest.approx(before, rel=1e-12), "a stub adds nothing"
    assert found["pipeline=2"][0] == pytest.approx(before, rel=1e-9)
    for layout in ("tensor=2", "shard=2"):
        assert found[layout] == pytest.approx(found["data=1"], rel=1e-9)
