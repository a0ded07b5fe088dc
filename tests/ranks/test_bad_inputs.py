"""Bad data, checkpoints, environments and arguments, as a person would meet them: one clear line, exit code 2.

Bad configurations have a table of their own in `tests/unit/test_bad_configs.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from wastenot.kernels import backend
from wastenot.tools.cli import main

CONFIG = """
model: {d_model: 16, layers: 1, heads: 2, moe: {experts: 2, d_expert: 16}}
schedule: {warmup_steps: 1}
data: {corpus: words.txt, tokenizer: bytes, seq_len: 16}
train: {steps: 2, batch: 2, eval_batch: 2, sample_tokens: 0}
log: {dir: run, tensorboard: false}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a configuration, its corpus and the finished run."""
    home = tmp_path_factory.mktemp("trained")
    (home / "words.txt").write_text("a stitch in time saves nine, said the seamstress. " * 60)
    (home / "run.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["train", "run.yaml"]) == 0, "this one is good"
    torch.set_deterministic_debug_mode("default")
    return home


@pytest.fixture
def home(trained, tmp_path, monkeypatch) -> Path:
    """A copy of `trained` that a test may damage, as the current folder."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def checkpoint(home: Path) -> Path:
    (found,) = (home / "run" / "checkpoints").glob("step-*")
    return found


def prepared(home: Path) -> Path:
    (found,) = (home / "data").glob("words-*")
    return found


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


FRESH = ["train", "run.yaml", "-s", "log.dir=fresh"]
RESUME = [*FRESH, "-s", "checkpoint.resume=run"]

DATA = {
    "empty text": (lambda h: (h / "words.txt").write_text(""), FRESH, "words: "),
    "text too short": (lambda h: (h / "words.txt").write_text("ab"), FRESH, ""),
    "not UTF-8": (lambda h: (h / "words.txt").write_bytes(b"\xff\xfe\xfa" * 100), FRESH, "words.txt"),
    "a missing file": (lambda h: (h / "words.txt").unlink(), FRESH, "words.txt"),
    "broken JSON lines": (
        lambda h: (h / "bad.jsonl").write_text('{"text": "fine"}\n{"text": '),
        [*FRESH, "-s", "data.corpus=bad.jsonl"],
        "bad.jsonl",
    ),
    "JSON lines without text": (
        lambda h: (h / "bad.jsonl").write_text('{"body": "hello"}\n'),
        [*FRESH, "-s", "data.corpus=bad.jsonl"],
        "text",
    ),
    "a folder of something else": (lambda h: None, [*FRESH, "-s", "data.corpus=run"], "not a prepared corpus"),
    "a truncated shard": (lambda h: truncate(prepared(h) / "train-00000.bin"), FRESH, "train-00000.bin"),
    "a missing shard": (lambda h: (prepared(h) / "val-00000.bin").unlink(), FRESH, "val-00000.bin"),
    "a broken tokenizer": (
        lambda h: (h / "t.json").write_text("{}"),
        [*FRESH, "-s", "data.tokenizer=t.json"],
        "t.json",
    ),
    "windows longer than the text": (lambda h: None, [*FRESH, "-s", "data.seq_len=100000"], "seq_len"),
    "prepare without files": (lambda h: None, ["data", "prepare", "nowhere.txt"], "nowhere.txt"),
}

CHECKPOINTS = {
    "no run": (lambda h: None, ["generate", "data", "--prompt", "x"], "is not a run"),
    "no such step": (lambda h: None, ["generate", "run", "--prompt", "x", "--checkpoint", "7"], "step 7"),
    "a truncated shard": (
        lambda h: truncate(next(checkpoint(h).glob("*.safetensors"))),
        ["eval", "run", "--checkpoint", "2"],
        "safetensors",
    ),
    "a missing shard": (
        lambda h: next(checkpoint(h).glob("*.safetensors")).unlink(),
        ["eval", "run", "--checkpoint", "2"],
        "safetensors",
    ),
    "no manifest": (
        lambda h: (checkpoint(h) / "meta.json").unlink(),
        ["eval", "run", "--checkpoint", "2"],
        "meta.json",
    ),
    "a manifest that is no JSON": (
        lambda h: (checkpoint(h) / "meta.json").write_text("{"),
        ["eval", "run", "--checkpoint", "2"],
        "meta.json",
    ),
    "another shape": (lambda h: None, [*RESUME, "-s", "model.d_model=32"], "32"),
    "other experts": (lambda h: None, [*RESUME, "-s", "model.moe.experts=4"], "4"),
    "nothing to resume": (lambda h: (h / "void").mkdir(), [*FRESH, "-s", "checkpoint.resume=void"], "void"),
    "a used folder": (lambda h: None, ["train", "run.yaml", "-s", "checkpoint.resume=never"], "already holds a run"),
    "another configuration": (lambda h: None, ["train", "run.yaml", "-s", "train.seed=5"], "train.seed: 0 -> 5"),
    "a lost tokenizer": (
        lambda h: (h / "run" / "tokenizer" / "tokenizer.json").unlink(),
        ["generate", "run", "--prompt", "x"],
        "tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data(name, home, capsys):
    check(*DATA[name], home, capsys)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoint(name, home, capsys):
    check(*CHECKPOINTS[name], home, capsys)


def check(damage, arguments: list[str], said: str, home: Path, capsys) -> None:
    damage(home)
    capsys.readouterr()
    code = main(arguments)
    output = capsys.readouterr()
    torch.set_deterministic_debug_mode("default")
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert code == 2, output.err
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in output.err


ENVIRONMENTS = {
    "RANK alone": ({"RANK": "0"}, "WORLD_SIZE"),
    "rank beyond the world": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
    "a rank that is no number": ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK"),
    "LOCAL_RANK alone": ({"LOCAL_RANK": "0"}, "LOCAL_RANK"),
    "nowhere to meet": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        "MASTER_ADDR",
    ),
    "an impossible port": (
        {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "99999",
        },
        "MASTER_PORT",
    ),
    "half of Open MPI": ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
    "half of MPICH": ({"PMI_RANK": "0", "MPI_LOCALRANKID": "0"}, "PMI_SIZE"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_bad_environment(name, home, capsys, monkeypatch):
    variables, said = ENVIRONMENTS[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    check(lambda _: None, FRESH, said, home, capsys)


@pytest.mark.parametrize(
    ("installed", "said"), [(True, "kernels: triton needs a CUDA device and this is cpu"), (False, "wastenot[triton]")]
)
def test_triton_where_it_cannot_run(installed, said, home, capsys, monkeypatch):
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(backend, "_has_triton", lambda: installed)
    check(lambda _: None, [*FRESH, "-s", "kernels=triton"], said, home, capsys)


def test_json_says_the_error_too(home, capsys):
    assert main([*FRESH, "-s", "data.corpus=run", "--json"]) == 2
    assert "not a prepared corpus" in json.loads(capsys.readouterr().out)["error"]
