"""Training through a pipeline, under every schedule, against one process: steps, evaluation, text, checkpoints."""

from __future__ import annotations

import itertools
import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from real_runs import TINY, finish, last_step, log_dir, losses, start, summary
from spawned import run_ranks
from torch import Tensor

from wastenot.launch.config import DataConfig, LogConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from wastenot.launch.engines.decoder import stages_of
from wastenot.launch.evaluate import Evaluation, evaluate
from wastenot.launch.layout_rules import layers_make_stages, micro_batches_fill_pipeline, world_rules
from wastenot.launch.metrics import read_metrics
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.precision import weight_dtype
from wastenot.launch.saved_run import open_run
from wastenot.launch.shards import TokenShards
from wastenot.launch.step import Stepper, make_stepper
from wastenot.moe.config import EmulateConfig, ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.moe.generate import generate
from wastenot.moe.ledger import Ledger
from wastenot.parallel.apply import seed_of
from wastenot.parallel.checkpoint import Checkpointer, load
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import expert_parameter_names
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.manifest import read_manifest
from wastenot.parallel.mesh import Mesh, make_mesh
from wastenot.parallel.training_state import load_training_state, training_state
from wastenot.tools.random_tokens import RandomTokens

STEPS = 3
SINGLE = ("gpipe", "1f1b", "zb-h1")
"""Schedules with one stage per rank: their cuts are the same."""
CHUNKED = ("interleaved", "dualpipev")
LAYOUTS = {
    "PP2": ParallelConfig(pipeline=2),
    "PP4": ParallelConfig(pipeline=4),
    "PP2 x DP2": ParallelConfig(pipeline=2, data=2),
    "PP2 x EP2": ParallelConfig(pipeline=2, expert=2),
}
DROPLESS = RouterConfig(top_k=2, balance_over="global", z_loss=1e-3, bias_update=0.01)
RECTIFIED = RouterConfig(
    top_k=2,
    capacity_factor=0.8,
    emulate=EmulateConfig(sources=2, owners=2),
    z_loss=1e-3,
    rectify=RectifyConfig(intra=True, fill=True),
)


def config(
    router: RouterConfig, parallel: ParallelConfig, precision: str = "fp64", batch: int = 16, **model: Any
) -> TrainConfig:
    """Every second of 8 layers has experts: some stages have none."""
    usual: dict[str, Any] = {"vocab_size": 61, "d_model": 32, "layers": 8, "heads": 4, "kv_heads": 2, "init_std": 0.1}
    usual["moe"] = MoEConfig(experts=8, d_expert=24, shared_experts=1, every=2)
    settings = TrainConfig(
        model=ModelConfig(**{**usual, **model}),
        router=router,
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=2),
        data=DataConfig(seq_len=12),
        train=LoopConfig(steps=STEPS, batch=batch, accumulate=8, precision=precision),  # pyright: ignore[reportArgumentType]
        log=LogConfig(debug=True),
    )
    assert not [*layers_make_stages(settings), *micro_batches_fill_pipeline(settings)]
    assert not world_rules(settings, parallel.world())
    return settings


def alone(settings: TrainConfig) -> TrainConfig:
    return replace(settings, parallel=ParallelConfig())


def stepper_of(settings: TrainConfig, mesh: Mesh) -> Stepper:
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    dtype = weight_dtype(settings.train.precision)
    model = build_decoder(settings.model, settings.router, mesh, dtype=dtype, stages=stages_of(settings, mesh))
    windows = RandomTokens(settings.model.vocab_size, settings.data.seq_len)
    # Small buckets, so that several are in flight at once.
    gradients = Gradients(model, mesh, bucket_bytes=20_000)
    return make_stepper(settings, mesh, model, make_optimizer(model, settings.optimizer), gradients, windows)  # pyright: ignore[reportArgumentType]


def train(settings: TrainConfig, steps: int = STEPS) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What each step told, and this rank's weights at the end."""
    stepper = stepper_of(settings, make_mesh(settings.parallel, "cpu"))
    told = []
    for step in range(steps):
        result = stepper.step(step, step * settings.train.batch, stop=False)
        assert result.applied
        numbers = {"loss": result.loss, "norm": result.grad_norm, **result.auxiliary}
        told.append(numbers | {"counts": result.counts.tolist()})
    return told, dict(stepper.model.state_dict())


def train_all(rank: int, world: int, of_each: dict[str, TrainConfig], steps: int = STEPS) -> dict[str, Any]:
    return {name: train(settings, steps) for name, settings in of_each.items()}


def whole(parts: list[dict[str, Tensor]], settings: TrainConfig) -> dict[str, Tensor]:
    """The model's tensors from those of all ranks; copies must be equal to the last bit."""
    each, degree = len(parts) // settings.parallel.pipeline, settings.parallel.expert
    found: dict[str, Tensor] = {}
    for first in range(0, len(parts), each):
        stage = parts[first : first + each]
        for name in stage[0]:
            is_expert = ".experts." in name
            for one in range(0, each, degree):
                copy = [part[name] for part in stage[one : one + degree]]
                tensor = torch.cat(copy) if is_expert else copy[0]
                assert is_expert or all(other.equal(tensor) for other in copy), name
                assert found.setdefault(name, tensor).equal(tensor), name
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", [DROPLESS, RECTIFIED], ids=["dropless", "rectified"])
def test_fp64_training_is_that_of_one_process_under_every_schedule(router, layout):
    parallel = LAYOUTS[layout]
    of_each = {name: config(router, replace(parallel, schedule=name)) for name in (*SINGLE, *CHUNKED)}
    expected, weights = train(alone(of_each["1f1b"]))
    ranks = run_ranks(parallel.world(), train_all, of_each, timeout=240)
    ends = {}
    for name, settings in of_each.items():
        told, _ = ranks[0][name]
        assert all(rank[name][0] == told for rank in ranks), name
        for here, there in zip(told, expected, strict=True):
            assert here.keys() == there.keys() == {"loss", "norm", "balance_loss", "z_loss", "counts"}
            assert here["counts"] == there["counts"], name
            numbers = here.keys() - {"counts"}
            assert [here[key] for key in numbers] == pytest.approx([there[key] for key in numbers], rel=1e-9), name
        ends[name] = whole([rank[name][1] for rank in ranks], settings)
        assert ends[name].keys() == weights.keys()
        for tensor_name, tensor in weights.items():
            torch.testing.assert_close(
                ends[name][tensor_name], tensor, rtol=1e-9, atol=1e-12, msg=f"{name} {tensor_name}"
            )
    # The same stages and micro-batches in the same order: what differs is only when.
    for name in SINGLE[1:]:
        assert [rank[name][0] for rank in ranks] == [rank["gpipe"][0] for rank in ranks], name
        assert all(tensor.equal(ends["gpipe"][tensor_name]) for tensor_name, tensor in ends[name].items()), name


def test_other_precisions_cuts_and_dense_models_train_as_in_one_process():
    two = ParallelConfig(pipeline=2)
    of_each = {
        "fp32": config(DROPLESS, two, "fp32"),
        "bf16": config(DROPLESS, replace(two, schedule="dualpipev"), "bf16"),
        "cut": config(DROPLESS, replace(two, schedule="interleaved", chunks=3, cut=(2, 1, 1, 1, 1, 2))),
        "dense": config(DROPLESS, replace(two, schedule="zb-h1"), moe=None),
        "tied": config(DROPLESS, replace(two, schedule="dualpipev"), tie_embeddings=True),
        "full norms": config(RECTIFIED, two, qk_norm="full"),
    }
    ranks = run_ranks(2, train_all, of_each, 2, timeout=240)
    for name, settings in of_each.items():
        expected, _ = train(alone(settings), 2)
        tolerance = {"fp32": 1e-5, "bf16": 1e-3}.get(settings.train.precision, 1e-9)
        for here, there in zip(ranks[1][name][0], expected, strict=True):
            assert (here["loss"], here["norm"]) == pytest.approx((there["loss"], there["norm"]), rel=tolerance), name


def skew(rank: int, world: int) -> list[float]:
    """Experts of one rank see all tokens, those of the other none."""
    router = RouterConfig(kind="skewed", skew=30.0, top_k=1, balance_loss=0.0)
    found = []
    for name in (*SINGLE, *CHUNKED):
        told, _ = train(config(router, replace(LAYOUTS["PP2 x EP2"], schedule=name)), steps=2)
        found.append(told[-1]["loss"])
    return found


def test_experts_without_tokens_never_hang():
    ranks = run_ranks(4, skew, timeout=120)
    assert len({loss for rank in ranks for loss in rank}) == 1


def poison(rank: int, world: int) -> list[bool]:
    settings = config(DROPLESS, replace(LAYOUTS["PP2 x EP2"], schedule="zb-h1"))
    recorder = Ledger()
    stepper = stepper_of(settings, make_mesh(settings.parallel, "cpu", recorder))
    applied = [stepper.step(0, 0, stop=False).applied]
    # Of hidden states, 16 x 12 x 32 numbers in fp64 over both ranks of a stage, one way.
    sent = recorder.page().collectives["pipeline-send"]
    assert (sent.calls, sent.num_bytes) == (8, 8 * 16 * 12 * 32 // 2)
    assert recorder.page().collectives["pipeline-receive"].calls == 8
    if rank == 3:
        next(stepper.model.parameters()).data.fill_(torch.nan)
    before = [p.detach().clone() for p in stepper.model.parameters()]
    applied.append(stepper.step(1, 16, stop=False).applied)
    assert all(p.equal(old) for p, old in zip(stepper.model.parameters(), before, strict=True) if rank != 3)
    return applied


def test_a_step_that_is_not_finite_on_one_stage_is_skipped_by_all():
    assert run_ranks(4, poison) == [[True, False]] * 4


# Forward only


TEXT = SimpleNamespace(num_tokens=531, end_token=60, num_text_bytes=500)
TEXT.read = lambda start, count: np.random.default_rng(7).integers(0, 61, count)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8]]


def read_and_write(rank: int, world: int, of_each: list[TrainConfig]) -> list[tuple[Evaluation, list[list[int]]]]:
    found = []
    for settings in of_each:
        mesh = make_mesh(settings.parallel, "cpu")
        model = build_decoder(
            settings.model, settings.router, mesh, dtype=torch.float64, stages=stages_of(settings, mesh)
        )
        held_out = evaluate(model, TEXT, mesh, seq_len=12, batch=8)  # pyright: ignore[reportArgumentType]
        texts = [generate(model, PROMPTS, max_new_tokens=6, temperature=heat, end_token=60) for heat in (0.0, 1.0)]
        found.append((held_out, [text for batch in texts for text in batch]))
    return found


def test_evaluation_and_texts_are_those_of_one_process():
    layouts = [
        ParallelConfig(pipeline=4),
        ParallelConfig(pipeline=2, expert=2, schedule="dualpipev"),
        ParallelConfig(pipeline=2, data=2, schedule="interleaved"),
    ]
    of_each = [config(DROPLESS, parallel) for parallel in layouts]
    [(held_out, texts)] = read_and_write(0, 1, [alone(of_each[0])])
    for rank in run_ranks(4, read_and_write, of_each):
        for there, found in rank:
            assert there.loss == pytest.approx(held_out.loss, rel=1e-12)
            assert (there.tokens, found) == (held_out.tokens, texts)


# Checkpoints


def drawn(name: str, shape: torch.Size, mesh: Mesh, is_expert: bool) -> Tensor:
    """This rank's part of a tensor that its name decides."""
    each = shape[0] if shape else 0
    rows = [each * mesh.expert.size, *shape[1:]] if is_expert else list(shape)
    tensor = torch.randn(rows, generator=torch.Generator().manual_seed(seed_of(name)), dtype=torch.float64)
    return tensor[mesh.expert.rank * each :][:each].clone() if is_expert else tensor


def saved(settings: TrainConfig, *, fill: bool) -> tuple[Mesh, Decoder, torch.optim.Optimizer]:
    """A model and an optimizer, with values that their names decide or fresh ones."""
    mesh = make_mesh(settings.parallel, "cpu")
    model = build_decoder(settings.model, settings.router, mesh, dtype=torch.float64, stages=stages_of(settings, mesh))
    optimizer = make_optimizer(model, settings.optimizer)
    if fill:
        experts = expert_parameter_names(model)
        for name, buffer in model.named_buffers():
            buffer.copy_(drawn(name, buffer.shape, mesh, is_expert=False))
        for name, p in model.named_parameters():
            p.grad = drawn(name, p.shape, mesh, name in experts)
        optimizer.step()
    return mesh, model, optimizer


def names_of(mesh: Mesh, model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return training_state(model, optimizer, mesh, expert_parameter_names(model).__contains__)


def save_and_load(rank: int, world: int, folder: Path, of_each: dict[str, TrainConfig]) -> None:
    for name, settings in of_each.items():
        mesh, model, optimizer = saved(settings, fill=True)
        checkpointer = Checkpointer(folder / name, mesh, asynchronous=name != "PP2")
        checkpointer.save(1, names_of(mesh, model, optimizer), {})
        checkpointer.close()
    for path, settings in itertools.product(sorted(folder.glob("*/step-*")), of_each.values()):
        mesh, model, optimizer = saved(settings, fill=False)
        load_training_state(path, model, optimizer, mesh, expert_parameter_names(model).__contains__)
        here, there = names_of(mesh, model, optimizer), names_of(*saved(settings, fill=True))
        assert here.keys() == there.keys()
        for name, tensor in here.items():
            one, other = (getattr(each, "_local_tensor", each) for each in (tensor, there[name]))
            assert one.equal(other), (path, name)


def test_every_layout_loads_what_every_other_wrote_bit_for_bit(tmp_path):
    def of(**parallel: Any) -> TrainConfig:
        return config(DROPLESS, ParallelConfig(**parallel), batch=64)

    save_and_load(0, 1, tmp_path, {"one": of()})
    wide = {
        "PP4 x EP2": of(pipeline=4, expert=2),
        "V": of(pipeline=2, expert=2, data=4, schedule="dualpipev"),
    }
    run_ranks(8, save_and_load, tmp_path, wide, timeout=120)
    layouts = {
        "DP4": of(data=4),
        "EP2": of(expert=2, data=4),
        "PP2": of(pipeline=2, data=2),
        "PP2 x EP2": of(pipeline=2, expert=2),
        "PP4": of(pipeline=4, schedule="interleaved"),
    }
    run_ranks(4, save_and_load, tmp_path, layouts, timeout=120)
    # What others wrote, into what wrote first.
    run_ranks(8, save_and_load, tmp_path, {"PP4 x EP2": wide["PP4 x EP2"]}, timeout=120)
    save_and_load(0, 1, tmp_path, {"one": of()})
    written = [read_manifest(path) for path in tmp_path.glob("*/step-*")]
    assert len(written) == 10
    assert len({tuple(sorted(manifest.tensors)) for manifest in written}) == 1
    assert sum(manifest.layout["pipeline"] > 1 for manifest in written) == 6


def refuse(rank: int, world: int, folder: Path) -> list[str]:
    mesh = make_mesh(ParallelConfig(pipeline=2, data=2), "cpu")
    checkpointer = Checkpointer(folder, mesh, asynchronous=False)
    own = f"stage{mesh.pipeline.rank}"
    messages = []
    for tensors in (
        {"shared": torch.zeros(2)},
        {own: torch.zeros(2 if rank != 3 else 3)},
        {own: torch.zeros(2), **({"odd": torch.zeros(1)} if rank == 1 else {})},
    ):
        with pytest.raises(ValueError, match="rank") as caught:
            checkpointer.save(1, tensors, {})
        messages.append(str(caught.value))
    checkpointer.save(1, {own: torch.zeros(2), f"{own}.more": torch.zeros(1)}, {})
    target = torch.ones(2)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load(checkpointer.latest() or "", {own: target}, mesh)
    assert target.eq(1).all()
    return [*messages, str(caught.value)]


def test_a_checkpoint_whose_stages_do_not_fit_together_is_refused_on_every_rank(tmp_path):
    first, *others = run_ranks(4, refuse, tmp_path)
    assert others == [first] * 3
    twice, shape, name, left = first
    assert twice == "shared is held by two pipeline stages, by those of rank 0 and 2"
    assert shape == "stage1 differs between ranks: (torch.float32, [2]) on rank 2, (torch.float32, [3]) on rank 3"
    assert name == "odd differs between ranks: missing on rank 0, (torch.float32, [1]) on rank 1"
    assert "2 only in the checkpoint: stage0.more, stage1.more" in left


def go_on(rank: int, world: int, settings: TrainConfig, path: Path | None, first: int, last: int, into: Path) -> list:
    """Losses of steps [first, last), from the checkpoint at `path`, and another one at their end."""
    mesh = make_mesh(settings.parallel, "cpu")
    stepper = stepper_of(settings, mesh)
    is_expert = expert_parameter_names(stepper.model).__contains__
    if path is not None:
        load_training_state(path, stepper.model, stepper.optimizer, mesh, is_expert)
    told = [stepper.step(step, step * settings.train.batch, stop=False) for step in range(first, last)]
    checkpointer = Checkpointer(into, mesh, asynchronous=False)
    checkpointer.save(last, training_state(stepper.model, stepper.optimizer, mesh, is_expert), {})
    return [(result.loss, result.grad_norm) for result in told]


def test_training_goes_on_bit_for_bit_and_under_other_layouts(tmp_path):
    settings = config(DROPLESS, replace(LAYOUTS["PP2 x EP2"], schedule="zb-h1"), "fp32")
    whole_run = run_ranks(4, go_on, settings, None, 0, 4, tmp_path / "whole")[0]
    half = run_ranks(4, go_on, settings, None, 0, 2, tmp_path / "half")[0]
    path = tmp_path / "half" / "step-00000002"
    rest = run_ranks(4, go_on, settings, path, 2, 4, tmp_path / "rest")[0]
    assert half + rest == whole_run
    moved = replace(settings, parallel=ParallelConfig(pipeline=2, schedule="dualpipev"))
    there = run_ranks(2, go_on, moved, path, 2, 4, tmp_path / "moved")[0]
    np.testing.assert_allclose(there, rest, rtol=1e-5)
    np.testing.assert_allclose(go_on(0, 1, alone(settings), path, 2, 4, tmp_path / "alone"), rest, rtol=1e-5)


# Whole runs


def test_a_run_through_a_pipeline_is_stopped_goes_on_and_ends_as_any_other(tmp_path):
    text = tmp_path / "words.jsonl"
    words = np.random.default_rng(0).choice(["the", "quick", "brown", "fox", "jumps", "over"], (3, 2000))
    text.write_text("\n".join(json.dumps({"text": " ".join(line)}) for line in words), encoding="utf-8")
    settings = json.loads(json.dumps(TINY))
    settings["data"] |= {"corpus": str(text), "dir": str(tmp_path / "prepared")}
    settings["router"] = {"top_k": 2, "balance_over": "global"}
    settings["parallel"] |= {"pipeline": 2}
    settings["train"] |= {"steps": 30, "accumulate": 2}
    paths = []
    for run, changes in (("whole", {}), ("stopped", {}), ("alone", {"pipeline": 1, "expert": 1})):
        path = tmp_path / run / "config.yaml"
        path.parent.mkdir()
        of_run = {**settings, "parallel": settings["parallel"] | changes}
        of_run["log"] = {**settings["log"], "dir": str(path.parent / "log")}
        path.write_text(yaml.safe_dump(of_run), encoding="utf-8")
        paths.append(path)
    uninterrupted, stopped, one = paths
    finish(start(uninterrupted))
    finish(start(one))
    process = start(stopped)
    while last_step(stopped) < 7 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "stopped by request" in finish(process)
    assert last_step(stopped) < 30
    assert "resumed from" in finish(start(stopped))
    assert losses(stopped) == losses(uninterrupted)
    for step, numbers in losses(uninterrupted).items():
        assert numbers == pytest.approx(losses(one)[step], rel=1e-3), step
    found, expected = summary(uninterrupted), summary(one)
    assert found["parameters"] == expected["parameters"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
    assert found["sample"]
    assert found["kept_ratio"] == 1
    ledger = json.loads((log_dir(uninterrupted) / "ledger.json").read_text())
    assert np.array(ledger["slots"]["kept"]).tolist() == [30 * 8 * 32 * 2] * 2
    assert {"pipeline-send", "pipeline-receive", "dispatch"} <= ledger["collectives"].keys()
    run = open_run(log_dir(uninterrupted))
    assert sum(p.numel() for p in run.model.parameters()) == found["parameters"]
    held_out = TokenShards.open(next((tmp_path / "prepared").glob("*/meta.json")).parent, "val")
    again = evaluate(run.model, held_out, run.mesh, seq_len=32, batch=32)
    assert again.loss == pytest.approx(found["val_loss"], rel=1e-5)
    line = next(line for line in read_metrics(log_dir(uninterrupted)) if "loss" in line)
    assert len(line["expert_load"]) == 2
