"""The guide for newcomers names options that exist, there and here, and its files train."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from wastenot.launch.config import TrainConfig
from wastenot.launch.settings import parse_config
from wastenot.launch.train import main
from wastenot.tools.bench.parity import make_corpus

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## From ([\w-]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
ROWS = [
    (engine, theirs, ours)
    for engine, text in SECTIONS.items()
    for theirs, ours in re.findall(r"^\| (.+?) \| `(.+?)` \|", text, re.M)
]
FILES = {engine: re.findall(r"```yaml\n(.*?)```", text, re.S) for engine, text in SECTIONS.items()}

# What a key needs beside it to be legal.
COMPANIONS = {
    "router.groups": {"router": {"groups": 8, "top_groups": 4, "top_k": 4}, "model": {"moe": {"experts": 64}}},
    "router.top_groups": {"router": {"groups": 8, "top_groups": 4, "top_k": 4}, "model": {"moe": {"experts": 64}}},
    "router.top_k": {"model": {"moe": {"experts": 64}}},
    "model.moe.dispatch": {"router": {"capacity_factor": 1.0}},
    "parallel.pipeline": {"train": {"accumulate": 4}},
    "parallel.schedule": {"model": {"layers": 8}, "parallel": {"pipeline": 2}, "train": {"accumulate": 4}},
    "parallel.shard": {"parallel": {"data": 1}},
    "model.kv_heads": {"model": {"heads": 16}},
    "train.accumulate": {"train": {"batch": 256}},
    "deepspeed.zero": {"engine": "deepspeed"},
}


def test_every_section_has_rows_and_a_file():
    assert set(SECTIONS) == {"Megatron-LM", "DeepSpeed", "transformers"} == set(FILES)
    assert all(len(FILES[engine]) == 1 for engine in FILES)
    assert all(sum(row[0] == engine for row in ROWS) > 15 for engine in SECTIONS)


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    both = dict(a)
    for key, value in b.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


@pytest.mark.parametrize(("engine", "theirs", "ours"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_a_key_and_its_value_are_ours(engine, theirs, ours):
    [(path, value)] = yaml.safe_load(ours).items()
    config = parse_config(merged(COMPANIONS.get(path, {}), nested(path, value)), theirs)
    found: Any = config
    for key in path.split("."):
        found = getattr(found, key)
    expected = float(value) if isinstance(found, float) else value
    assert found == expected
    assert isinstance(config, TrainConfig)


MEGATRON_NAMES = {
    "moe-router-load-balancing-type": "moe_router_load_balancing_type",
    "moe-token-drop-policy": "moe_token_drop_policy",
    "norm-epsilon": "layernorm_epsilon",
    "num-experts": "num_moe_experts",
    "swiglu": "gated_linear_unit",
}
OF_THE_SCRIPT = {
    *("group-query-attention", "rotary-base", "untie-embeddings-and-output-weights", "seq-length", "global-batch-size"),
    *("micro-batch-size", "train-iters", "seed", "lr", "min-lr", "lr-decay-style", "lr-warmup-iters", "weight-decay"),
    *("adam-beta2", "adam-eps", "clip-grad", "save-interval", "save", "eval-interval", "log-interval"),
    *("num-virtual-stages-per-pipeline-rank", "use-distributed-optimizer", "data-path", "tokenizer-model"),
}
"""Options of Megatron-LM's script that are not the configuration of its core."""


def test_options_of_megatron_are_its_own():
    config = pytest.importorskip("megatron.core.transformer.transformer_config", reason="needs megatron-core")
    fields = {field.name for field in dataclasses.fields(config.TransformerConfig)}
    flags = {
        flag for engine, theirs, _ in ROWS if engine == "Megatron-LM" for flag in re.findall(r"--([\w-]+)", theirs)
    }
    assert flags > OF_THE_SCRIPT
    unknown = {flag for flag in flags - OF_THE_SCRIPT if MEGATRON_NAMES.get(flag, flag.replace("-", "_")) not in fields}
    assert not unknown


def test_arguments_of_transformers_are_its_own():
    arguments = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    families = (transformers.MixtralConfig(), transformers.Qwen3MoeConfig(), transformers.DeepseekV3Config())
    of_models = {key for family in families for key in family.to_dict()} | {"rope_theta"}
    rows = [theirs.strip("`") for engine, theirs, _ in ROWS if engine == "transformers"]
    assert not {row.split("=")[0] for row in rows if "=" in row} - arguments
    assert not {row.split(":")[0] for row in rows if "=" not in row} - of_models


@pytest.mark.parametrize("engine", list(FILES))
def test_the_file_trains(engine, tmp_path):
    corpus = make_corpus(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(FILES[engine][0], encoding="utf-8")
    changes = {
        # DeepSpeed would change what warns in this process; tests of its own train with it.
        "engine": "native",
        "train.steps": 2,
        "parallel.data": 1,
        "parallel.expert": 1,
        "data.corpus": corpus,
        "log.dir": tmp_path / "run",
        "schedule.warmup_steps": 1,
        "log.tensorboard": "false",
        "train.sample_tokens": 0,
    }
    assert main([str(file), *(f"--set={key}={value}" for key, value in changes.items())]) == 0


def test_arguments_and_keys_of_deepspeed_are_its_own():
    # Read, not imported: its import warns, and takes seconds.
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.submodule_search_locations
    home = Path(spec.submodule_search_locations[0])
    rows = [theirs.strip("`") for engine, theirs, _ in ROWS if engine == "DeepSpeed"]
    layer = ast.parse((home / "moe" / "layer.py").read_text(encoding="utf-8"))
    [init] = [f for f in ast.walk(layer) if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    given = {re.findall(r"\((\w+)=", row)[0] for row in rows if row.startswith("MoE(")}
    assert given and given <= {argument.arg for argument in init.args.args}
    files = [home / "runtime" / "constants.py", *(home / "runtime").rglob("*config.py")]
    known = {name for file in files for name in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
    keys = {row.split(":")[0].split(".")[0] for row in rows if not row.startswith("MoE(")}
    assert len(keys) > 5 and keys <= known
