"""The JSON that DeepSpeed is given: what the YAML decides, and what a file of the user's may say beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wastenot.launch.config import DataConfig, LoopConfig, TrainConfig
from wastenot.launch.engine_config import DeepSpeedConfig
from wastenot.launch.engines.deepspeed_json import merged
from wastenot.launch.errors import UserError


def config(said: object = None, folder: Path | None = None, zero: int = 2) -> TrainConfig:
    path = None
    if folder is not None:
        path = folder / "theirs.json"
        path.write_text(said if isinstance(said, str) else json.dumps(said))
    return TrainConfig(
        engine="deepspeed",
        deepspeed=DeepSpeedConfig(zero=zero, json=None if path is None else str(path)),
        data=DataConfig(seq_len=32),
        train=LoopConfig(batch=24, accumulate=3),
    )


def test_sizes_follow_from_the_yaml():
    made = merged(config(), 4)
    assert made["train_batch_size"] == 24 == made["train_micro_batch_size_per_gpu"] * 3 * 4
    assert made["zero_optimization"]["stage"] == 2
    assert made["gradient_clipping"] == 0.0, "clipping is ours: DeepSpeed's norm averages those of experts"


def test_a_file_of_the_users_goes_over_it_entry_by_entry(tmp_path):
    said = {
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 2, "overlap_comm": True, "cpu_offload": False},
        "bf16": "auto",
        "wall_clock_breakdown": True,
    }
    made = merged(config(said, tmp_path), 2)
    assert made == merged(config(), 2) | {
        "wall_clock_breakdown": True,
        "zero_optimization": merged(config(), 2)["zero_optimization"] | {"overlap_comm": True, "cpu_offload": False},
    }


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size: 8 is not 24, which train.batch decides; leave it out"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu: 8 is not 4"),
        ({"zero_optimization": {"stage": 1}}, "stage: 1 is not 2, which deepspeed.zero decides"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: true is not false, which train.precision decides"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: the optimizer is that of optimizer.name; leave it out"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: gradients are clipped"),
        ({"zero_optimization": True}, "zero_optimization: true cannot stand there; give an object, or leave it out"),
        ({"zero_optimization": None}, "zero_optimization: null cannot stand there"),
        ({"bf16": "on"}, 'bf16: "on" cannot stand there'),
        (
            {"zero_allow_untested_optimizer": {"a": 1}},
            'zero_allow_untested_optimizer: {"a": 1} cannot stand there; give true',
        ),
        ({"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload: gradients are clipped where"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "mics_shard_size: weights are shared by all ranks"),
        ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint.writer: a checkpoint is published when its files"),
        ({"amp": {"enabled": True}}, "amp.enabled: precision is that of train.precision"),
        ({"elasticity": {"enabled": True}}, "elasticity.enabled: the batch is that of train.batch"),
        ("{", "cannot be read"),
        ([], "holds no JSON object"),
    ],
)
def test_what_contradicts_the_yaml_is_one_clear_error(said, message, tmp_path):
    with pytest.raises(UserError, match=r"deepspeed\.json: ") as caught:
        merged(config(said, tmp_path), 2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
