"""Which runs another engine takes; what is said of the others, and of an engine that is not installed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from wastenot.launch import engine_config, engine_rules
from wastenot.launch.config import TrainConfig
from wastenot.launch.errors import UserError
from wastenot.launch.settings import load_config, parse_config

MOE = {"model": {"moe": {"experts": 8}}}


@pytest.mark.parametrize("engine", ["native", "deepspeed", "megatron"])
def test_a_plain_run_is_every_engines(engine: str):
    assert parse_config({"engine": engine}, "here").engine == engine


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"engine": "horovod"}, "engine: 'horovod' is not one of native, deepspeed, megatron"),
        ({"engine": "deepspeed", "deepspeed": {"zero": 4}}, "deepspeed.zero: 4 is no stage of ZeRO; use 3"),
        ({"engine": "deepspeed", "deepspeed": {"zero": -1}}, "deepspeed.zero: -1 is no stage of ZeRO; use 0"),
        (
            {"engine": "deepspeed", "parallel": {"pipeline": 2}, "train": {"accumulate": 2}},
            "parallel.pipeline: 2 stages need an engine with a pipeline for our model; use 1, or engine:",
        ),
        (
            {"engine": "deepspeed", "deepspeed": {"zero": 3}, "parallel": {"expert": 2}},
            "deepspeed.zero: 3 is not there for experts over ranks",
        ),
        (
            {"engine": "deepspeed", "deepspeed": {"zero": 1}, "optimizer": {"name": "muon"}},
            "deepspeed.zero: 1 gives muon parts of weights, which it cannot step; use 0",
        ),
        ({"engine": "deepspeed", "train": {"precision": "fp64"}}, "train.precision: DeepSpeed keeps no fp64"),
        ({"engine": "megatron", "parallel": {"tensor": 2}}, "parallel.tensor: under megatron no model is cut"),
        (
            {"engine": "deepspeed", "parallel": {"shard": 2}},
            "parallel.shard: under deepspeed no model is sharded",
        ),
        (
            {"engine": "deepspeed", "recompute": {"mode": "lynx"}},
            "recompute.mode: lynx is not there under deepspeed; use full",
        ),
        (
            {"engine": "megatron", "train": {"only": "router"}},
            "train.only: under megatron no model is trained in",
        ),
        ({"engine": "megatron", "model": {"qk_norm": "full"}}, "model.qk_norm: full has no counterpart in"),
        (
            {"engine": "megatron", "parallel": {"piece_bytes": 4096}},
            "parallel.piece_bytes: 4096 has no counterpart in Megatron-Core: its dispatcher sends each exchange whole",
        ),
        (
            {
                "engine": "megatron",
                "parallel": {"pipeline": 2, "schedule": "gpipe"},
                "train": {"accumulate": 2},
            },
            "parallel.schedule: gpipe has no counterpart in Megatron-Core",
        ),
    ],
)
def test_what_an_engine_cannot_do_is_one_line_with_the_nearest_that_it_can(given: dict[str, Any], said: str):
    with pytest.raises(UserError) as raised:
        parse_config(given, "here")
    [line] = str(raised.value).splitlines()
    assert line.startswith(f"here: {said}"), line


def test_an_engine_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path):
    def nothing(name: str):
        if name == "megatron.core":
            # As where another's package has the name.
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(engine_config, "find_spec", nothing)
    for engine in ("deepspeed", "megatron"):
        [violation] = engine_rules.engine_is_installed(TrainConfig(engine=engine))
        expected = f"{engine} is not installed; pip install 'wastenot[{engine}]', or use engine: native"
        assert violation.message == expected
        with pytest.raises(UserError, match=f"pip install 'wastenot\\[{engine}\\]'"):
            load_config("quickstart", [f"engine={engine}"])
    assert not engine_rules.engine_is_installed(TrainConfig())


def test_no_engine_is_imported_before_it_is_asked_for():
    program = """
import sys
import wastenot.launch.trainer, wastenot.launch.engines.native, wastenot.launch.settings
import wastenot.tools.cli, wastenot.tools.convert, wastenot.moe.adapters.huggingface
from wastenot.launch.settings import load_config
for engine in ("native", "deepspeed"):
    load_config("quickstart", [f"engine={engine}"])
print([name for name in ("deepspeed", "megatron.core", "transformers", "apex", "mpi4py") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
