"""Other engines on a CUDA device, where Megatron-Core runs without the shim: the losses of the native one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from wastenot.launch.engine_config import what_is_missing
from wastenot.tools.bench.parity import make_corpus
from wastenot.tools.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Imports of theirs.
    pytest.mark.filterwarnings("ignore"),
]


def losses(folder: Path, corpus: Path, engine: str, **changes: Any) -> list[float]:
    settings = {
        "engine": engine,
        "data.corpus": corpus,
        "data.tokenizer": "bytes",
        "data.seq_len": 64,
        "model.layers": 2,
        "model.d_model": 64,
        "model.moe.d_expert": 64,
        "router.capacity_factor": 1.0,
        "router.rectify": "{intra: true, fill: true}",
        "train.steps": 5,
        "train.batch": 8,
        "train.sample_tokens": 0,
        "schedule.warmup_steps": 1,
        "parallel.expert": 1,
        "log.every": 1,
        "log.tensorboard": "false",
        "log.dir": folder,
        **changes,
    }
    assert main(["train", "quickstart", *(f"--set={key}={value}" for key, value in settings.items())]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("deepspeed", {"deepspeed.zero": 1}),
        ("megatron", {}),
        ("megatron", {"megatron.layer": "wastenot"}),
    ],
)
def test_losses_are_those_of_the_native_engine(engine: str, changes: dict[str, Any], tmp_path: Path):
    if reason := what_is_missing(engine):  # type: ignore[arg-type]
        pytest.skip(reason)
    corpus = make_corpus(tmp_path)
    expected = losses(tmp_path / "native", corpus, "native")
    found = losses(tmp_path / engine, corpus, engine, **changes)
    assert len(found) == 5
    assert found == pytest.approx(expected, rel=1e-3)
