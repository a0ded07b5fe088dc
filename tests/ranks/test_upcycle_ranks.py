"""Expert-parallel ranks upcycle one dense model into one mixture, and train it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from spawned import run_ranks
from torch import Tensor

from wastenot.launch.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoopConfig,
    ScheduleConfig,
    TrainConfig,
)
from wastenot.launch.metrics import read_metrics
from wastenot.launch.saved_run import write_run
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.config import ModelConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.moe.upcycle import upcycle_, upcycled_config
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import make_mesh, single
from wastenot.tools.cli import main

DENSE = ModelConfig(vocab_size=257, d_model=32, layers=4, heads=4, d_ff=48, init_std=0.2, moe=None)


def upcycle(rank: int, world: int, top_k: int, tokens_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's logits and its weights."""
    mesh = make_mesh(ParallelConfig(expert=world), "cpu")
    dense = build_decoder(DENSE, RouterConfig(), mesh, seed=1, dtype=torch.float64)
    router = RouterConfig(top_k=top_k)
    model = build_decoder(upcycled_config(DENSE, 4), router, mesh, seed=99, dtype=torch.float64)
    upcycle_(model, dense, seed=7)
    hidden = model(tokens_BS.chunk(world)[rank]).hidden_BSD
    return model.logits(hidden).detach(), {name: tensor.detach() for name, tensor in model.named_parameters()}


def test_ranks_hold_the_model_of_one_process_and_compute_what_the_dense_one_does() -> None:
    tokens_BS = torch.randint(0, 257, (4, 19), generator=torch.Generator().manual_seed(0))
    dense = build_decoder(DENSE, RouterConfig(), single(), seed=1, dtype=torch.float64)
    expected = dense.logits(dense(tokens_BS).hidden_BSD).detach()
    for top_k in (1, 2):
        whole = build_decoder(upcycled_config(DENSE, 4), RouterConfig(), single(), seed=98, dtype=torch.float64)
        upcycle_(whole, dense, seed=7)
        results = run_ranks(2, upcycle, top_k, tokens_BS)
        torch.testing.assert_close(torch.cat([logits for logits, _ in results]), expected, rtol=1e-12, atol=1e-12)
        for name, parameter in whole.named_parameters():
            shares = [weights[name] for _, weights in results]
            if ".experts." in name:
                assert torch.equal(torch.cat(shares), parameter)
            else:
                assert all(torch.equal(share, parameter) for share in shares)


def train(config: Path, *settings: str) -> float:
    """Loss of the first step of a training run by the command line."""
    folder = config.parent.with_name(f"{config.parent.name}-trained")
    given = [f"log.dir={folder}", f"checkpoint.resume={config.parent}", *settings]
    command = [sys.executable, "-m", "wastenot.tools.cli", "train", str(config)]
    done = subprocess.run(
        [*command, *(part for setting in given for part in ("-s", setting))],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert f"starting from the weights of {config.parent}" in done.stdout + done.stderr
    return next(line["loss"] for line in read_metrics(folder) if "loss" in line)


def test_training_goes_on_where_the_dense_model_was(tmp_path: Path) -> None:
    """From the same weights, on the same first batch: the same loss, with experts on two ranks."""
    text = json.dumps({"text": " ".join(f"{i} green bottles, hanging on the wall;" for i in range(300))})
    (tmp_path / "bottles.jsonl").write_text(text)
    config = TrainConfig(
        model=replace(DENSE, init_std=0.05),
        data=DataConfig(
            corpus=str(tmp_path / "bottles.jsonl"), dir=str(tmp_path / "data"), tokenizer="bytes", seq_len=32
        ),
        schedule=ScheduleConfig(warmup_steps=1),
        train=LoopConfig(steps=2, batch=4, eval_batch=4, sample_tokens=0),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(dir=str(tmp_path / "dense"), every=1, tensorboard=False),
    )
    write_run(config, build_decoder(config.model, config.router, single(), seed=1), byte_tokenizer(), "a test")
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "4", "--top-k", "2"]) == 0
    before = train(tmp_path / "dense" / "config.yaml")
    after = train(tmp_path / "moe" / "config.yaml", "parallel.expert=2")
    assert abs(after - before) < 1e-5 * before
