"""Recomputation changes no bit of training, under any layout, and lets go of memory as it says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from real_runs import TINY, finish, log_dir, losses, start
from spawned import run_ranks
from test_parallel_parity import config
from torch import Tensor

from wastenot.launch.config import TrainConfig
from wastenot.launch.engines.decoder import stages_of
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.peak_memory import peak_bytes
from wastenot.launch.precision import compute_dtype, weight_dtype
from wastenot.launch.step import make_stepper
from wastenot.moe.config import RectifyConfig, RouterConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.parallel import recompute
from wastenot.parallel.config import ParallelConfig, RecomputeConfig
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import Mesh, make_mesh, single
from wastenot.parallel.tensor import local
from wastenot.tools.bench.memory import saved_for_backward
from wastenot.tools.random_tokens import RandomTokens

MODES = ("none", "selective", "full")
SPLIT = ("zb-h1", "dualpipev")
"""Schedules that split a backward."""
SENT_BY_EXPERTS = ("dispatch-counts", "dispatch", "combine")
SENT_BY_TENSOR_RANKS = ("tensor-gather", "tensor-scatter", "tensor-norm")
"""Forward, within blocks."""
ALONE = ParallelConfig()
LAYOUTS = {
    "EP2": ParallelConfig(expert=2),
    "EP2 x DP2": ParallelConfig(expert=2, data=4),
    "FSDP2": ParallelConfig(shard=2),
    "FSDP2 x EP2": ParallelConfig(shard=2, expert=2),
    "TP2 x EP2": ParallelConfig(tensor=2, expert=2),
    "PP2 x FSDP2": ParallelConfig(pipeline=2, shard=2),
    **{name: ParallelConfig(pipeline=2, expert=2, schedule=name) for name in ("1f1b", "interleaved", *SPLIT)},
}
RECTIFIED = RouterConfig(
    top_k=2, capacity_factor=0.8, jitter=0.3, z_loss=1e-3, rectify=RectifyConfig(intra=True, fill=True)
)
CASES: dict[str, tuple[RouterConfig, dict[str, Any]]] = {
    "dropless": (
        RouterConfig(top_k=2, balance_over="global", z_loss=1e-3, bias_update=0.01, score="sigmoid", jitter=0.1),
        {"first_dense": 1},
    ),
    "rectified": (RECTIFIED, {}),
    "padded": (
        replace(RECTIFIED, rectify=RectifyConfig(intra=True, capacity=0.5), bias_update=0.01),
        {"dispatch": "padded"},
    ),
}
PRECISIONS = ("fp64", "fp32", "bf16")


class Heard:
    """Every collective that this rank entered, in order."""

    def __init__(self) -> None:
        self.entered: list[tuple[str, int]] = []

    def collective_entered(self, name: str, num_bytes: int) -> None:
        self.entered.append((name, num_bytes))

    def collective_left(self, name: str, waited: Any, hidden: float = 0.0) -> None:
        pass


def settings_of(case: str, layout: ParallelConfig, precision: str) -> TrainConfig:
    """Two steps of a few micro-batches, with shared experts, auxiliary losses, and identities checked."""
    router, moe = CASES[case]
    settings = config(router, precision, **moe)
    train = replace(settings.train, steps=2, accumulate=2 if layout.pipeline == 1 else 4)
    model = replace(settings.model, qk_norm="full", layers=max(2, layout.num_stages))
    return replace(settings, model=model, parallel=layout, train=train)


def model_of(settings: TrainConfig, mode: str, mesh: Mesh) -> Decoder:
    return build_decoder(
        settings.model,
        settings.router,
        mesh,
        dtype=weight_dtype(settings.train.precision),
        stages=stages_of(settings, mesh),
        compute_dtype=compute_dtype(settings.train.precision),
        recompute=RecomputeConfig(mode=mode),  # pyright: ignore[reportArgumentType]
    )


def train(
    settings: TrainConfig, mode: str, before: Callable[[Decoder, int], object] | None = None
) -> tuple[dict[str, Tensor], list[tuple[str, int]]]:
    """All that the steps come to on this rank, and what it made travel; `before` each it sees the model."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    heard = Heard()
    layout = settings.parallel
    mesh = make_mesh(layout, "cpu", heard) if layout.world() > 1 else single(recorder=heard)
    model = model_of(settings, mode, mesh)
    windows = RandomTokens(settings.model.vocab_size, settings.data.seq_len)
    # Small buckets, so that several are in flight at once.
    gradients = Gradients(model, mesh, bucket_bytes=20_000)
    optimizer = make_optimizer(model, settings.optimizer)
    stepper = make_stepper(settings, mesh, model, optimizer, gradients, windows)  # pyright: ignore[reportArgumentType]
    found: dict[str, Tensor] = {}
    for step in range(settings.train.steps):
        if before is not None:
            before(model, step)
        result = stepper.step(step, step * settings.train.batch, stop=False)
        assert result.applied
        numbers = [result.loss, result.grad_norm, *result.auxiliary.values()]
        found |= {f"numbers {step}": torch.tensor(numbers, dtype=torch.float64)}
        found |= {f"counts {step}": result.counts, f"own counts {step}": result.local_counts}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[name] = local(tensor.detach())
        if tensor.grad is not None:
            found[f"gradient of {name}"] = local(tensor.grad)
    return found, heard.entered


def compare(rank: int, world: int, of_each: dict[str, TrainConfig]) -> dict[str, dict[str, list[tuple[str, int]]]]:
    """What travels in each mode, of which the numbers are the same bits."""
    travels = {}
    for name, settings in of_each.items():
        plain, entered = train(settings, "none")
        assert any(key.startswith("gradient of blocks") for key in plain), "compares gradients"
        travels[name] = {"none": entered}
        for mode in MODES[1:]:
            other, travels[name][mode] = train(settings, mode)
            assert other.keys() == plain.keys()
            for key, tensor in plain.items():
                assert other[key].equal(tensor), (name, mode, key)
    return travels


def test_no_bit_changes_on_one_rank():
    of_each = {f"{case} {kind}": settings_of(case, ALONE, kind) for case in CASES for kind in PRECISIONS}
    [travels] = run_ranks(1, compare, of_each)
    assert travels.keys() == of_each.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_bit_changes_and_only_full_sends_again(name):
    layout = LAYOUTS[name]
    of_each = {case: settings_of(case, layout, kind) for case, kind in zip(CASES, PRECISIONS, strict=True)}
    for travels in run_ranks(layout.world(), compare, of_each, timeout=120):
        for entered in travels.values():
            assert entered["selective"] == entered["none"]
            once, again = (Counter(key for key, _ in entered[mode]) for mode in ("none", "full"))
            in_blocks = {key for key in once if key.split(".")[-1] in SENT_BY_EXPERTS or key in SENT_BY_TENSOR_RANKS}
            assert {key for key in once | again if again[key] != once[key]} == in_blocks
            for key in in_blocks:
                # A split backward computes again for the gradients of inputs, and for those of weights.
                most = 3 if layout.schedule in SPLIT else 2
                # The last sum of a dense network is of no use to backward.
                least = 1 if key == "tensor-scatter" else 2
                assert least * once[key] <= again[key] <= most * once[key], key


def test_ranks_without_tokens_send_again_with_the_others():
    """Skewed to a few experts of one rank: the others compute nothing again."""
    router = RouterConfig(kind="skewed", skew=30.0, top_k=1, balance_loss=0.0)
    of_each = {
        str(layout): replace(settings_of("dropless", layout, "fp32"), router=router)
        for layout in (ParallelConfig(expert=4), ParallelConfig(shard=4, expert=2), LAYOUTS["zb-h1"])
    }
    run_ranks(4, compare, of_each)


# Memory


def kept_and_peak(rank: int, world: int, settings: TrainConfig) -> dict[str, tuple[int, int]]:
    """Bytes kept for backward, and most of a forward and backward at once, in each mode; of 512 tokens."""
    tokens_BS = torch.randint(61, (8, 64))
    found = {}
    for mode in MODES:
        model = model_of(settings, mode, single())

        def loss(model: Decoder = model) -> Tensor:
            return model.loss_sum(model(tokens_BS).hidden_BSD, tokens_BS)

        with saved_for_backward(model) as saved:
            loss()
        found[mode] = sum(saved.values()), peak_bytes(lambda loss=loss: loss().backward())
    return found


def test_memory_is_let_go_of():
    settings = settings_of("dropless", ALONE, "fp32")
    assert settings.model.moe is not None
    for first_dense in (0, 3):
        moe = replace(settings.model.moe, d_expert=64, first_dense=first_dense)
        model = replace(settings.model, layers=4, moe=moe)
        [found] = run_ranks(1, kept_and_peak, replace(settings, model=model))
        (none, none_peak), (selective, selective_peak), (full, full_peak) = (found[mode] for mode in MODES)
        # Of two choices of each token gate, up and silu(gate); in the shared and the dense network their product too.
        widths = (4 - first_dense) * (2 * 3 * 64 + 4 * 64) + first_dense * 4 * model.dense_width
        assert none - selective == pytest.approx(512 * widths * 4, rel=0.01)
        assert full < 0.15 * selective < 0.15 * none
        assert full_peak < 0.8 * selective_peak < 0.64 * none_peak


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_pays_nothing(mode, monkeypatch):
    calls = []
    monkeypatch.setattr(recompute, "checkpoint", lambda function, *args, **how: calls.append(how) or function(*args))
    model = model_of(settings_of("dropless", ALONE, "fp32"), mode, single())
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert not calls
    model(torch.zeros(1, 4, dtype=torch.int64))
    # Two blocks; one dense network, experts and a shared one.
    assert len(calls) == {"none": 0, "selective": 3, "full": 2}[mode]


# Whole runs


def test_a_run_recomputes_as_its_configuration_says(tmp_path):
    text = tmp_path / "words.jsonl"
    words = np.random.default_rng(0).choice(["the", "quick", "brown", "fox", "jumps", "over"], (3, 2000))
    text.write_text("\n".join(json.dumps({"text": " ".join(line)}) for line in words), encoding="utf-8")
    settings = json.loads(json.dumps(TINY))
    settings["data"] |= {"corpus": str(text), "dir": str(tmp_path / "prepared")}
    settings["train"] |= {"steps": 5, "eval_every": 0}
    told = {}
    for mode in ("none", "full"):
        path = tmp_path / mode / "config.yaml"
        path.parent.mkdir()
        log = {**settings["log"], "dir": str(path.parent / "log")}
        path.write_text(yaml.safe_dump({**settings, "recompute": {"mode": mode}, "log": log}), encoding="utf-8")
        finish(start(path))
        told[mode] = losses(path), json.loads((log_dir(path) / "ledger.json").read_text())
    (curve, plain), (curve_again, again) = told.values()
    assert len(curve) == 5
    assert curve_again == curve
    assert again["slots"] == plain["slots"]
    calls = {name: found["calls"] for name, found in plain["collectives"].items()}
    for name, found in again["collectives"].items():
        assert found["calls"] == (2 if name in SENT_BY_EXPERTS else 1) * calls[name], name
