"""`wastenot compress …` as people call it: all stages of a small run, stages that go on, and input that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from stock_models import CONFIGS
from transformers import AutoModelForCausalLM

from wastenot.launch.calibration import calibration
from wastenot.launch.saved_run import open_run
from wastenot.launch.streamed import open_streamed
from wastenot.moe.compress.calibration import padded
from wastenot.moe.compress.evaluate import Evaluator
from wastenot.moe.compress.plan import read_plan
from wastenot.moe.compress.profile import read_profile
from wastenot.tools.cli import main
from wastenot.tools.compress.quality import judged, unigram_accuracy
from wastenot.tools.compress.speed import compare, of_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "".join(f"{i} green bottles, hanging on the wall; {i} green bottles, standing in the hall.\n" for i in range(80))
SETTINGS = {
    "model": {"d_model": 32, "layers": 5, "heads": 2, "qk_norm": "head", "moe": {"experts": 4, "d_expert": 32}},
    "router": {"top_k": 2},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 4},
    "data": {"tokenizer": "bytes", "seq_len": 32, "val_fraction": 0.2},
    "train": {"steps": 40, "batch": 8, "sample_tokens": 0, "eval_every": 0},
    "log": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `deep`, a trained run; its profile `seen`; and `stock`, a stock Mixtral with a tokenizer."""
    home = tmp_path_factory.mktemp("home")
    (home / "bottles.txt").write_text(TEXT)
    settings = json.loads(json.dumps(SETTINGS))
    settings["data"] |= {"corpus": str(home / "bottles.txt"), "dir": str(home / "data")}
    settings["log"]["dir"] = str(home / "deep")
    (home / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(home / "config.yaml")]) == 0
    assert main(["compress", "profile", str(home / "deep"), str(home / "seen"), "--windows", "16"]) == 0
    config = type(CONFIGS["mixtral"])(**{**CONFIGS["mixtral"].to_dict(), "vocab_size": 257})
    AutoModelForCausalLM.from_config(config).save_pretrained(home / "stock")
    for path in (home / "deep" / "tokenizer").iterdir():
        shutil.copyfile(path, home / "stock" / path.name)
    return home


def json_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main(["compress", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which `words` end, exit code 2."""
    capsys.readouterr()
    assert main(["compress", *words]) == 2
    out, err = capsys.readouterr()
    told = [line for line in err.strip().splitlines() if not line.startswith(("profile:", "plan:"))]
    assert out == "" and len(told) == 1 and told[0].startswith("error: ")
    return told[0]


def test_auto_makes_a_smaller_run_that_stock_transformers_loads(home, capsys):
    out = home / "auto"
    words = ("auto", str(home / "deep"), "-o", str(out), "--drop-layers", "2", "--recover", "6", "--bits", "8")
    words += ("--stability", "--windows", "12")
    told = json_of(capsys, *words)
    stability = json.loads((out / "quality.json").read_text())["stability"]
    assert [each["tokens"] for each in stability] == [3 * 32, 6 * 32]
    assert all(0.5 < each["jaccard"] <= 1 for each in stability)
    assert all(stage["seconds"] > 0 for stage in told["stages"][1:])
    names = [stage["name"] for stage in told["stages"]]
    assert names == ["whole", "applied", "recovered", "quantized"]
    whole, applied, recovered, quantized = told["stages"]
    assert whole["kept"] == 1 and whole["kl"] == 0
    assert whole["parameters"] > applied["parameters"] == recovered["parameters"]
    assert applied["bytes"] > 1.5 * quantized["bytes"]
    assert abs(quantized["loss"] - recovered["loss"]) < 0.05
    assert all(stage["decode_tokens_per_second"] > 0 for stage in told["stages"])
    assert "Export: what is in exported/ has all its bits" in "".join(told["notes"])
    assert json.loads((out / "verify.json").read_text())["passed"]
    plan = read_plan(out / "plan.yaml")
    assert len(plan.layers) == 2 and plan.base == read_profile(home / "seen").base
    model = open_run(out / "recovered").model
    assert sum(block.ffn is None for block in model.blocks) == 2
    assert (out / "report.html").read_text().count(plan.hash) >= 1
    before = {path: path.stat().st_mtime_ns for path in (out / "recovered").rglob("*") if path.is_file()}
    again = json_of(capsys, *words)
    assert [stage["loss"] for stage in again["stages"]] == [stage["loss"] for stage in told["stages"]]
    assert before == {path: path.stat().st_mtime_ns for path in (out / "recovered").rglob("*") if path.is_file()}
    weights = load_file(out / "exported" / "model.safetensors")
    save_file(
        {name: 2 * weight for name, weight in weights.items()}, out / "exported" / "model.safetensors", {"format": "pt"}
    )
    capsys.readouterr()
    assert main(["compress", *words]) == 2
    assert "exported: is not to be served: logits differ by" in capsys.readouterr().err
    assert not json.loads((out / "verify.json").read_text())["passed"]
    told = refused(capsys, *words[:-2])
    assert "holds a compression with --windows 12, and this is one with --windows 64" in told
    assert "with --bits 8, and this is one without --bits; name" in refused(
        capsys, *(word for word in words if word not in ("--bits", "8"))
    )


def test_auto_takes_a_stock_checkpoint_to_another_that_verifies(home, capsys):
    out = home / "stock-auto"
    told = json_of(
        capsys, "auto", str(home / "stock"), "-o", str(out), "--data", str(home / "bottles.txt"), "--seq-len", "24",
        "--windows", "6", "--drop-layers", "1", "--keep-experts", "4",
    )  # fmt: skip
    assert [stage["name"] for stage in told["stages"]] == ["whole", "applied"]
    assert json.loads((out / "verify.json").read_text())["passed"]
    loaded, info = AutoModelForCausalLM.from_pretrained(out / "exported", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.model_type == "qwen2_moe" and loaded.config.num_experts == 4
    for words, message in {
        ("--drop-layers", "9"): "--drop-layers: 9 cannot go; use 0 to 3",
        ("--keep-experts", "1"): "--keep-experts: 1 of 6 cannot be left where the router chooses 2; use 2",
    }.items():
        told = refused(
            capsys, "auto", str(home / "stock"), "-o", str(home / "no"), "--data", str(home / "bottles.txt"), *words
        )
        assert message in told and not (home / "no").exists()
    assert "only runs of ours are trained here" in refused(capsys, "auto", str(home / "stock"), "--recover", "3")


def test_text_is_the_runs_own_a_files_or_what_the_model_writes(home, capsys, tmp_path):
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    for name, words in {
        "own": (),
        "file": ("--data", str(tmp_path / "lines.jsonl")),
        "documents": ("--data", str(tmp_path / "lines.jsonl"), "--documents", "--seq-len", "100"),
        "self": ("--data", "self"),
    }.items():
        told = json_of(capsys, "profile", str(home / "deep"), str(tmp_path / name), "--windows", "5", *words)
        assert told["calibration"]["windows"] == 5, name
        assert (told["calibration"]["tokens"] < 500) == (name == "documents") or name != "documents"
        assert told["experts_without_tokens"] == 0
    prints = {read_profile(tmp_path / name).calibration["fingerprint"] for name in ("own", "file", "documents", "self")}
    assert len(prints) == 4


def test_a_run_with_a_capacity_is_judged_without(home, tmp_path):
    """As the whole model is: what a capacity drops is no matter of compression."""
    shutil.copytree(home / "deep", tmp_path / "capped")
    config = yaml.safe_load((tmp_path / "capped" / "config.yaml").read_text())
    config["router"]["capacity_factor"] = 0.5
    (tmp_path / "capped" / "config.yaml").write_text(yaml.safe_dump(config))
    judge = Evaluator(open_streamed(tmp_path / "capped"), calibration(tmp_path / "capped", None, "val", 6, None))
    found = judged(tmp_path / "capped", judge)
    assert found.loss == pytest.approx(judge.whole.loss, rel=1e-5) and found.kl < 1e-6


def test_the_commonest_token_is_one_that_counts():
    text = padded([[5, 5, 7], [5, 7]], 8, "padded")
    assert unigram_accuracy(text.tokens_NS[text.mask_NS], text) == pytest.approx(1 / 3)


def test_a_plan_within_a_budget_has_no_more_than_that(home, capsys, tmp_path):
    whole = json_of(capsys, "plan", str(home / "seen"), str(tmp_path / "none.yaml"), "--bits", "8")
    told = json_of(
        capsys, "plan", str(home / "seen"), str(tmp_path / "plan.yaml"), "--checkpoint", str(home / "deep"),
        "--target", "params=60000", "--windows", "6",
    )  # fmt: skip
    in_bits = json_of(
        capsys, "plan", str(home / "seen"), str(tmp_path / "small.yaml"), "--checkpoint", str(home / "deep"),
        "--target", "bytes=240000", "--bits", "8", "--windows", "6",
    )  # fmt: skip
    assert in_bits["blocks_left"] == 5 and len(in_bits["search"]) == 1  # 8 bits are enough
    assert whole["search"] == [] and told["search"][-1]["cost"] <= 60000 < told["search"][-2]["cost"]
    assert told["hash"] == read_plan(tmp_path / "plan.yaml").hash
    by_time = json_of(
        capsys, "plan", str(home / "seen"), str(tmp_path / "fast.yaml"), "--checkpoint", str(home / "deep"),
        "--target", "step-time=0.7", "--kinds", "blocks,layers", "--windows", "6",
    )  # fmt: skip
    assert by_time["blocks"] or by_time["layers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--drop-layers", "9"), "layers: 9 cannot be dropped of 5 MoE layers that may go; use 1 to 5"),
        (("--drop-blocks", "5"), "blocks: 5 cannot be dropped of 4 blocks"),
        (("--keep-experts", "1"), "keep: 1 of 4 experts cannot be left where the router chooses 2"),
        (("--drop-blocks", "3", "--consecutive", "--iterative"), "--iterative"),
        ((), "nothing is to go"),
        (("--target", "speed=2"), "--checkpoint"),
        (("--protect", "3"), "--protect: '3' is not FIRST,LAST"),
        (("--slim", "wanda", "--sparsity", "1.5"), "sparsity: 1.5 is outside (0, 1)"),
        (("--bits", "4", "--group", "20"), "group: 20 is not a power of two"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_and_nothing_written(home, capsys, tmp_path, words, message):
    told = refused(capsys, "plan", str(home / "seen"), str(tmp_path / "plan.yaml"), *words)
    assert message in told
    assert not list(tmp_path.iterdir())


def test_budgets_that_make_no_sense_are_refused(home, capsys, tmp_path):
    plan = ("plan", str(home / "seen"), str(tmp_path / "p.yaml"), "--checkpoint", str(home / "deep"), "--windows", "4")
    for target, message in {
        "speed=2": "'speed=2' is not WHAT=MOST",
        "params": "is not WHAT=MOST",
        "kl=low": "'low' is no number",
        "step-time=1.5": "1.5 is outside (0, 1)",
        "params=10": "params: 10 cannot be reached",
        "kl=1 --drop-layers 1": "leave --drop-layers, --drop-blocks and --keep-experts out",
    }.items():
        assert message in refused(capsys, *plan, "--target", *target.split(" "))
    assert "--kinds: 'heads' is none" in refused(capsys, *plan, "--target", "kl=1", "--kinds", "heads")
    other = refused(capsys, *plan[:4], str(home / "stock"), "--target", "kl=1", "--data", str(home / "bottles.txt"))
    assert "is a profile of another checkpoint" in other
    assert not list(tmp_path.iterdir())


def test_input_that_is_no_checkpoint_is_refused_and_nothing_written(home, capsys, tmp_path):
    text = ("--windows", "4", "--data", str(home / "bottles.txt"))
    shutil.copytree(home / "stock", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cut" in refused(capsys, "profile", str(tmp_path / "cut"), str(tmp_path / "p"), *text)
    shutil.copytree(home / "stock", tmp_path / "gpt")
    config = json.loads((tmp_path / "gpt" / "config.json").read_text())
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    told = refused(capsys, "profile", str(tmp_path / "gpt"), str(tmp_path / "p"), *text)
    assert "'gpt2'" in told and "mixtral" in told
    assert "--max-memory: 1KiB is less than" in refused(
        capsys, "profile", str(home / "deep"), str(tmp_path / "p"), "--max-memory", "1KiB"
    )
    assert "name a corpus or a file with --data" in refused(capsys, "profile", str(home / "stock"), str(tmp_path / "p"))
    assert "is no finished profile" in refused(capsys, "plan", str(home / "deep"), str(tmp_path / "plan.yaml"))
    assert "did you mean profile?" in refused(capsys, "profil", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "gpt"]


def test_d14_a_token_is_timed_with_the_text_before_it(home):
    """Defect D14: the public code times one-token forwards that see no context."""
    model = open_run(home / "deep").model
    seen: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, given: seen.append((given[0].size(1), given[1].filled)))
    found = compare({"deep": of_decoder(model, prompt=20, written=4)}, prompt=20, rounds=1)
    assert seen == [(20, 0), (1, 20), (1, 21), (1, 22), (1, 23)] * 2
    assert found["deep"].prefill > 0 and found["deep"].decode > 0


def test_d15_a_profile_is_no_other_checkpoints(home, capsys, tmp_path):
    """Defect D15: the public code trusts a cache of similarities by the name of its file."""
    words = ("--windows", "4", "--data", str(home / "bottles.txt"), "--seq-len", "24")
    assert json_of(capsys, "profile", str(home / "stock"), str(tmp_path / "p"), *words)["moe_layers"] == 3
    torch.manual_seed(1)
    config = AutoModelForCausalLM.from_pretrained(home / "stock").config
    shutil.copytree(home / "stock", tmp_path / "other")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    told = refused(capsys, "profile", str(tmp_path / "other"), str(tmp_path / "p"), *words)
    assert "holds a profile of another base; name a new folder" in told
