"""`compress recover`: a run that begins with another's weights, learns in part or from a teacher, and is resumable."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from wastenot.launch.metrics import read_metrics
from wastenot.launch.run_folder import RunFolder
from wastenot.launch.saved_run import SavedRun, blank_decoder, open_run, write_run
from wastenot.moe.config import ModelConfig
from wastenot.parallel.mesh import single
from wastenot.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "".join(f"{i} green bottles, hanging on the wall; {i} green bottles, standing in the hall.\n" for i in range(40))
SETTINGS = {
    "model": {"d_model": 32, "layers": 3, "heads": 2, "moe": {"experts": 4, "d_expert": 16}},
    "router": {"top_k": 2},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 4},
    "data": {"tokenizer": "bytes", "seq_len": 16},
    "train": {"steps": 80, "batch": 8, "sample_tokens": 0},
    "log": {"every": 1, "tensorboard": False},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `dense`, a trained run, and `dropped`: the same without the experts of its last layer but one."""
    home = tmp_path_factory.mktemp("home")
    (home / "bottles.txt").write_text(TEXT)
    settings = json.loads(json.dumps(SETTINGS))
    settings["data"] |= {"corpus": str(home / "bottles.txt"), "dir": str(home / "data")}
    settings["log"]["dir"] = str(home / "dense")
    (home / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(home / "config.yaml")]) == 0
    drop(home / "dense", home / "dropped", per_layer=[4, 0, 4])
    return home


def drop(source: Path, target: Path, per_layer: Sequence[int], dense: Sequence[int] = ()) -> None:
    """The run at `source` without the networks of layers that have none in `per_layer`."""
    saved = open_run(source)
    assert saved.config.model.moe is not None
    moe = replace(saved.config.model.moe, per_layer=tuple(per_layer), dense=tuple(dense))
    model = replace(saved.config.model, moe=moe)
    config = replace(saved.config, model=model, log=replace(saved.config.log, dir=str(target)))
    less = blank_decoder(config, single(), config.router)
    kept = {name: weight for name, weight in saved.model.state_dict().items() if name in less.state_dict()}
    less.load_state_dict(kept)
    write_run(config, less, saved.tokenizer, str(source))


def recover(home: Path, target: Path, *arguments: str, source: str = "dropped", expected: int = 0) -> dict[str, Any]:
    """The summary of a recovered run."""
    command = ["compress", "recover", str(home / source), str(target), *arguments]
    assert main(command) == expected
    return json.loads((target / "summary.json").read_text()) if expected == 0 else {}


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(run) if "loss" in line]


def weights(run: Path | SavedRun) -> dict[str, Tensor]:
    return dict((open_run(run) if isinstance(run, Path) else run).model.named_parameters())


def changed(run: Path, source: Path) -> set[str]:
    """Names of the parameters that are not what they were, bit for bit."""
    after, before = weights(run), weights(source)
    assert after.keys() == before.keys()
    return {name for name in after if not after[name].equal(before[name])}


def test_recovery_wins_back_a_part_of_what_was_lost(home, tmp_path, capsys):
    settings = ["-s", "train.distill.weight=1", "-s", "optimizer.lr=3e-3"]
    done = recover(home, tmp_path / "run", "--teacher", str(home / "dense"), "--steps", "30", *settings)
    dense = json.loads((home / "dense" / "summary.json").read_text())
    assert done["teacher_val_loss"] == pytest.approx(dense["val_loss"], rel=1e-6)
    assert done["start_val_loss"] > done["teacher_val_loss"]
    lost, left = (done[name] - done["teacher_val_loss"] for name in ("start_val_loss", "val_loss"))
    assert left < 0.6 * lost, done
    # What a run that began with nothing says of these.
    assert dense["start_val_loss"] is None and dense["teacher_val_loss"] is None
    lines = list(read_metrics(tmp_path / "run"))
    assert [line["val_loss"] for line in lines if "val_loss" in line] == [done["start_val_loss"], done["val_loss"]]
    divergences = [line["divergence"] for line in lines if "divergence" in line]
    assert len(divergences) == 30 and max(divergences[-5:]) < min(divergences[:5])
    # It is a run as any other.
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(done["val_loss"], rel=1e-6)
    assert main(["generate", str(tmp_path / "run"), "--tokens", "4"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0


def test_an_interrupted_recovery_goes_on_bit_for_bit(home, tmp_path):
    arguments = ["--teacher", str(home / "dense"), "--steps", "10", "--train", "router"]
    done = recover(home, tmp_path / "whole", *arguments)
    recover(home, tmp_path / "cut", *arguments)
    # As one that was killed after the checkpoint of step 8: every second step is saved, two stay.
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000010")
    (tmp_path / "cut" / "summary.json").unlink()
    again = recover(home, tmp_path / "cut", *arguments)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 10
    names = ("val_loss", "start_val_loss", "teacher_val_loss")
    assert [again[name] for name in names] == [done[name] for name in names]
    assert not changed(tmp_path / "cut", tmp_path / "whole")


def test_a_teacher_that_was_trained_on_is_another(home, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(home / "dense", teacher)
    arguments = ["--teacher", str(teacher), "--steps", "4"]
    recover(home, tmp_path / "run", *arguments)
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    before = losses(tmp_path / "run")
    assert main(["train", str(teacher / "config.yaml"), "-s", f"log.dir={teacher}", "-s", "train.steps=81"]) == 0
    capsys.readouterr()
    recover(home, tmp_path / "run", *arguments, expected=2)
    [said] = capsys.readouterr().err.splitlines()
    assert re.search(
        r"learned from step-00000080 \(\w+\) of .*, whose newest is now step-00000081 .* another log.dir", said
    )
    shutil.rmtree(teacher / "checkpoints" / "step-00000081")
    recover(home, tmp_path / "run", *arguments)
    assert losses(tmp_path / "run") == before


def of_norms(name: str) -> bool:
    return name.endswith("norm.weight")


@pytest.mark.parametrize(
    ("only", "learns"), [("router", lambda name: ".router." in name), ("norms", of_norms), ("all", lambda name: True)]
)
def test_what_does_not_learn_stays_bit_for_bit(home, tmp_path, only: str, learns: Callable[[str], bool]):
    recover(home, tmp_path / "run", "--teacher", str(home / "dense"), "--steps", "3", "--train", only)
    source = home / "dropped"
    assert changed(tmp_path / "run", source) == {name for name in weights(source) if learns(name)}
    held = torch.cat([w.flatten() for name, w in weights(source).items() if learns(name)]).numel()
    line = [line for line in read_metrics(tmp_path / "run") if "optimizer_bytes" in line][-1]
    # Two moments of what learns, and a count for each parameter.
    assert 8 * held <= line["optimizer_bytes"] < 8 * held + 1000


@pytest.mark.parametrize("name", ["adapprox", "muon", "adafactor"])
@pytest.mark.parametrize("only", ["router", "norms"])
def test_every_optimizer_copes_with_little_to_learn(home, tmp_path, only, name):
    recover(home, tmp_path / "run", "--steps", "2", "--train", only, "-s", f"optimizer.name={name}")
    assert changed(tmp_path / "run", home / "dropped")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_slimming_left_out_stays_out(home, tmp_path, optimizer):
    saved = open_run(home / "dropped")
    slim = [p for name, p in saved.model.named_parameters() if ".experts." in name]
    with torch.no_grad():
        for p in slim:
            p.clamp_(min=0)
        # An expert that is skipped: all of it.
        slim[0][1] = 0
    config = replace(saved.config, log=replace(saved.config.log, dir=str(tmp_path / "slim")))
    write_run(config, saved.model, saved.tokenizer, "a test")
    before = weights(tmp_path / "slim")
    recover(tmp_path, tmp_path / "run", "--steps", "3", "-s", f"optimizer.name={optimizer}", source="slim")
    for name, weight in weights(tmp_path / "run").items():
        assert not weight.equal(before[name]), name
        if ".experts." in name:
            assert weight.eq(0).equal(before[name].eq(0)), name
    settings = ["-s", "train.keep_zeros=false"]
    recover(tmp_path, tmp_path / "free", "--steps", "1", *settings, source="slim")
    assert weights(tmp_path / "free")["blocks.2.ffn.experts.down"].eq(0).sum() == 0


def test_a_teacher_of_no_weight_changes_nothing(home, tmp_path):
    recover(home, tmp_path / "alone", "--steps", "4")
    teacher = ["--teacher", str(home / "dense"), "-s", "train.distill.weight=0"]
    recover(home, tmp_path / "taught", "--steps", "4", *teacher)
    assert losses(tmp_path / "taught") == losses(tmp_path / "alone")
    assert not changed(tmp_path / "taught", tmp_path / "alone")


def test_a_teacher_that_is_the_model_teaches_nothing(home, tmp_path):
    settings = ["-s", "train.distill.weight=1", "-s", "router.balance_loss=0", "-s", "optimizer.weight_decay=0"]
    teacher = ["--teacher", str(home / "dropped")]
    recover(home, tmp_path / "run", "--steps", "2", *teacher, *settings)
    first, *_ = (line for line in read_metrics(tmp_path / "run") if "loss" in line)
    assert first["divergence"] == 0 and first["grad_norm"] == 0


def test_a_stub_changes_nothing_until_it_has_learned(home, tmp_path):
    done = recover(home, tmp_path / "run", "--stub", "16", "--train", "stub", "--steps", "20")
    bare = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert bare == done
    # Nothing is added to any number: the loss is that without the stub, bit for bit.
    first = recover(home, tmp_path / "bare", "--steps", "1")
    assert done["start_val_loss"] == first["start_val_loss"]
    assert done["val_loss"] < done["start_val_loss"]
    after, before = weights(tmp_path / "run"), weights(home / "dropped")
    stub = {f"blocks.1.ffn.{part}.weight" for part in ("gate", "up", "down")}
    assert after.keys() - before.keys() == stub | {"blocks.1.ffn_norm.weight"}
    assert all(after[name].equal(weight) for name, weight in before.items())
    assert after["blocks.1.ffn_norm.weight"].eq(1).all(), "stub is the network alone"
    assert after["blocks.1.ffn.down.weight"].any() and after["blocks.1.ffn.gate.weight"].shape == (16, 32)
    model: ModelConfig = RunFolder(tmp_path / "run").load_config().model
    assert model.moe is not None
    assert (model.moe.per_layer, model.moe.dense, model.dense_width) == ((4, 0, 4), (1,), 16)


def test_text_of_the_teacher_is_written_once(home, tmp_path, capsys):
    arguments = ["--teacher", str(home / "dense"), "--data", "self", "--tokens", "2000", "--steps", "2"]
    done = recover(home, tmp_path / "run", *arguments)
    corpus = Path(RunFolder(tmp_path / "run").load_config().data.corpus)
    assert corpus.name.startswith("self-") and corpus.parent == home / "data"
    written = (corpus / "meta.json").stat().st_mtime_ns
    # Held-out text stays that of the run.
    plain = recover(home, tmp_path / "plain", "--teacher", str(home / "dense"), "--steps", "2")
    assert done["start_val_loss"] == plain["start_val_loss"]
    assert done["teacher_val_loss"] == plain["teacher_val_loss"]
    assert losses(tmp_path / "run") != losses(tmp_path / "plain")
    recover(home, tmp_path / "again", *arguments)
    assert (corpus / "meta.json").stat().st_mtime_ns == written
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


BAD = [
    (["--train", "stub"], "train.only: stub learns nothing where no layer has a dense feed-forward network"),
    (["--stub", "0"], "--stub: 0 is too small; use 1 or more"),
    (["--tokens", "5"], "--tokens: 5 are those of --data self; leave it out"),
    (["--data", "self"], "--data: self is text that the teacher writes; name one with --teacher"),
    (["--data", "self", "--teacher", "DENSE", "--tokens", "0"], "--tokens: 0 is too small; use 1 or more"),
    (["--teacher", "nowhere"], "train.distill.teacher: nowhere is not a run: it has no config.yaml"),
    (["--teacher", "OTHER"], "has another tokenizer than data.corpus was prepared with"),
    (["--teacher", "DENSE", "-s", "train.distill.weight=2"], "train.distill.weight: 2.0 is outside [0, 1]; use 1.0"),
    (["--teacher", "DENSE", "-s", "train.distill.temperature=0"], "train.distill.temperature: 0.0 is not positive"),
    (["-s", "train.start=nowhere"], "train.start: nowhere is not a run: it has no config.yaml"),
    (["-s", "log.dir=SOURCE"], "holds a run of another configuration"),
    (["-s", "checkpoint.resume=SOURCE"], "is another beginning than train.start"),
    (["--train", "norms", "-s", "router.bias_update=0.1"], "router.bias_update: 0.1 would move routers"),
    (["--train", "router", "-s", "parallel.pipeline=2"], "parallel.pipeline: 2 stages pass gradients on"),
    (["--teacher", "DENSE", "-s", "parallel.pipeline=2"], "pass on one model's hidden states"),
    (
        ["--teacher", "DENSE", "-s", "parallel.tensor=4", "-s", "model.heads=4"],
        "does not fit these ranks: parallel.tensor",
    ),
    (["--train", "router", "-s", "recompute.mode=lynx"], "recompute.mode: lynx plans the whole backward of one model"),
    (["-s", "model.d_model=64"], "train.start: "),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_cannot_be_is_refused_in_one_clear_line(home, tmp_path, capsys, arguments, message):
    other = tmp_path / "other"
    shutil.copytree(home / "dense", other)
    tokens = other / "tokenizer" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"<|endoftext|>"', '"<|end_of_text|>"'))
    (other / "tokenizer" / "tokenizer_config.json").unlink()
    places = {"DENSE": home / "dense", "OTHER": other, "SOURCE": home / "dropped"}
    words = []
    for word in arguments:
        for name, path in places.items():
            word = word.replace(name, str(path))
        words.append(word)
    recover(home, tmp_path / "run", *words, expected=2)
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run" / "summary.json").exists()


def test_stubs_need_a_layer_that_only_attends_and_one_width(home, tmp_path, capsys):
    recover(home, tmp_path / "run", "--stub", "16", source="dense", expected=2)
    assert "only attends; drop MoE layers first, or leave --stub out" in capsys.readouterr().err
    recover(home, tmp_path / "first", "--stub", "16", "--steps", "1")
    drop(tmp_path / "first", tmp_path / "less", per_layer=[0, 0, 4], dense=[1])
    recover(tmp_path, tmp_path / "second", "--stub", "24", source="less", expected=2)
    assert "--stub: 24 is not the width of the dense layers [1]" in capsys.readouterr().err
    before = weights(tmp_path / "less")["blocks.1.ffn.down.weight"]
    recover(tmp_path, tmp_path / "second", "--stub", "16", "--train", "norms", "--steps", "1", source="less")
    after = weights(tmp_path / "second")
    assert after["blocks.1.ffn.down.weight"].equal(before) and before.any(), "a stub that has learned stays"
    assert not after["blocks.0.ffn.down.weight"].any()
