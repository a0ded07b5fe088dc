"""`wastenot generate`, `eval` and `convert` on a run that stands on the disk as training leaves it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from wastenot.launch.config import CheckpointConfig, DataConfig, LogConfig, LoopConfig, ScheduleConfig, TrainConfig
from wastenot.launch.corpus import prepare_files
from wastenot.launch.data import eval_windows
from wastenot.launch.evaluate import evaluate
from wastenot.launch.run_folder import RunFolder
from wastenot.launch.saved_run import open_run, write_run
from wastenot.launch.settings import as_mapping
from wastenot.launch.shards import TokenShards
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.adapters.huggingface import StoredWeights
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder, with_router
from wastenot.moe.generate import generate
from wastenot.moe.routing import Routing
from wastenot.moe.trace import read_trace
from wastenot.parallel.checkpoint import Checkpointer
from wastenot.parallel.expert import expert_parameter_names
from wastenot.parallel.mesh import single
from wastenot.parallel.training_state import training_state
from wastenot.tools.cli import main

TEXT = "".join(
    f"{i} green bottles, hanging on the wall; {i} green bottles, standing in the hall.\n" for i in range(120)
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    home = tmp_path_factory.mktemp("home")
    (home / "bottles.txt").write_text(TEXT)
    data = DataConfig(dir=str(home / "data"), tokenizer="bytes", seq_len=32, val_fraction=0.2)
    folder = prepare_files([home / "bottles.txt"], data, progress=False)
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=257, d_model=32, layers=2, heads=4, init_std=0.2, moe=MoEConfig(experts=4, d_expert=16)
        ),
        router=RouterConfig(top_k=2),
        data=DataConfig(corpus=str(folder), dir=data.dir, tokenizer="bytes", seq_len=32, val_fraction=0.2),
        schedule=ScheduleConfig(warmup_steps=1),
        train=LoopConfig(steps=2, eval_batch=4),
        checkpoint=CheckpointConfig(every=1),
        log=LogConfig(dir=str(home / "run")),
    )
    run = RunFolder(config.log.dir)
    run.prepare(config, sorted(folder.glob("tokenizer*.json")))
    checkpoints = Checkpointer(run.checkpoints, single(), asynchronous=False)
    for step in (1, 2):
        model = build_decoder(config.model, config.router, single(), seed=step)
        state = training_state(model, None, single(), expert_parameter_names(model).__contains__)
        checkpoints.save(step, state, {"config": as_mapping(config)})
    checkpoints.close()
    return run.path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """What the command prints with --json."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What the command says of bad input."""
    assert main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err


def test_generate_continues_every_prompt(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = answer(capsys, "generate", made, "--prompt", "ten green", "--prompt", "nine", "--tokens", "9")
    assert (given["run"], given["step"]) == (str(made), 2)
    first, second = given["samples"]
    assert first["text"].startswith("ten green")
    assert second["text"].startswith("nine")
    assert all(sample["new_tokens"] == 9 or sample["ended"] for sample in given["samples"])
    again = answer(capsys, "generate", made, "--prompt", "ten green", "--tokens", "9", "--seed", "1")
    assert again["samples"][0]["text"] != first["text"], "another seed"


def test_generate_greedily_is_the_librarys_greedy(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--tokens", "12", "--temperature", "0", "--checkpoint", "1")
    [sample] = answer(capsys, "generate", made, "--prompt", "green", *options)["samples"]
    saved = open_run(made, 1)
    prompt = saved.tokenizer.encode("green")
    [expected] = generate(saved.model, [prompt], max_new_tokens=12, temperature=0, end_token=saved.tokenizer.end_token)
    assert sample["text"] == saved.tokenizer.decode(prompt + expected)
    assert sample != answer(capsys, "generate", made, "--prompt", "green", *options[:-2])["samples"][0], "the newest"


def test_generate_without_a_prompt_begins_a_document(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(made), "--tokens", "40"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "<|endoftext|>" not in out
    assert "trained on 32 at a time" in err


def test_a_run_works_where_its_corpus_is_gone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (run / "config.yaml").read_text()
    lines = [line if not line.startswith("  corpus:") else "  corpus: /nowhere/at/all" for line in config.splitlines()]
    (run / "config.yaml").write_text("\n".join(lines))
    assert answer(capsys, "generate", run, "--tokens", "3")["step"] == 2
    assert "nowhere/at/all is neither a known corpus" in complaint(capsys, "eval", run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature: -1.0 is negative"),
        (["--top-p", "0"], "top_p: 0.0 is outside (0, 1]"),
        (["--top-k", "-2"], "top_k: -2 is negative"),
        (["--tokens", "0"], "max_new_tokens: 0 is too small"),
        (["--checkpoint", "3"], "has no checkpoint of step 3; it has 1, 2"),
    ],
)
def test_generate_refuses(options: list[str], message: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in complaint(capsys, "generate", made, *options)


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run: it has no config.yaml" in complaint(capsys, "generate", tmp_path)
    shard = next((run / "checkpoints" / "step-00000001").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert "checkpoint of" in complaint(capsys, "generate", run, "--checkpoint", "1")
    shutil.rmtree(run / "checkpoints")
    assert "has no complete checkpoint" in complaint(capsys, "eval", run)
    shutil.rmtree(run / "tokenizer")
    assert "tokenizer/tokenizer.json is missing" in complaint(capsys, "generate", run)


def test_a_step_saved_again_is_the_later_one(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000001-2")
    assert open_run(run, 1).checkpoint.name == "step-00000001-2"


def test_kernels_that_cannot_run_here_give_way(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wastenot.kernels.backend.interpreted", lambda: False)
    config = (run / "config.yaml").read_text()
    assert "kernels: auto" in config
    (run / "config.yaml").write_text(config.replace("kernels: auto", "kernels: triton"))
    assert open_run(run).config.kernels == ("triton" if torch.cuda.is_available() else "auto")


def test_eval_gives_the_figures_of_the_library(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = answer(capsys, "eval", made)
    saved = open_run(made)
    shards = TokenShards.open(Path(given["data"]), "val")
    expected = evaluate(saved.model, shards, saved.mesh, seq_len=32, batch=4)
    assert given["val_loss"] == expected.loss
    assert given["val_bits_per_byte"] == expected.bits_per_byte
    assert given["tokens"] == expected.tokens == shards.num_text_bytes
    assert 0 < given["order5_bits_per_byte"] < given["order1_bits_per_byte"]
    assert answer(capsys, "eval", made, "--checkpoint", "1")["val_loss"] != expected.loss


def test_eval_records_the_routing_of_the_first_batch(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace"
    given = answer(capsys, "eval", made, "--trace", file)
    assert given == answer(capsys, "eval", made)
    saved = open_run(made)
    inputs, _ = eval_windows(TokenShards.open(Path(given["data"]), "val"), 32)
    routings = saved.model(torch.from_numpy(inputs[:4])).routings
    trace = read_trace(file, {0: 4, 1: 4})
    assert len(trace) == len(routings) == 2
    for layer, routing in zip(trace, routings, strict=True):
        assert torch.from_numpy(layer).equal(routing.logits_TE)


def test_evaluation_tells_which_routed_tokens_are_text(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = open_run(made)
    shards = TokenShards.open(Path(answer(capsys, "eval", made)["data"]), "val")
    heard: list[tuple[int, int]] = []

    def hear(routings: Sequence[Routing], tokens: int) -> None:
        heard.append((routings[0].num_tokens, tokens))

    evaluate(saved.model, shards, saved.mesh, seq_len=32, batch=40, routed=hear)
    windows = len(eval_windows(shards, 32)[0])
    assert len(heard) == -(-windows // 40) > 1
    assert {tokens for tokens, _ in heard} == {40 * 32}
    assert [text for _, text in heard[:-1]] == [40 * 32] * (len(heard) - 1)
    assert sum(text for _, text in heard) == windows * 32


@pytest.mark.parametrize(("file", "message"), [(".", "is a folder"), ("gone/trace", "which does not exist")])
def test_eval_refuses_a_trace_that_it_could_not_write(
    file: str, message: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint(capsys, "eval", made, "--trace", tmp_path / file)


def test_eval_prints_a_table(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(made)]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_eval_refuses_text_in_other_tokens(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text(TEXT)
    data = DataConfig(dir=str(tmp_path / "data"), tokenizer="bpe:300", val_fraction=0.2)
    folder = prepare_files([tmp_path / "other.txt"], data, progress=False)
    assert "was prepared with another tokenizer" in complaint(capsys, "eval", made, "--data", folder)


def test_eval_takes_other_text_in_the_same_tokens(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    tokenizer = made / "tokenizer" / "tokenizer.json"
    data = DataConfig(dir=str(tmp_path / "data"), tokenizer=str(tokenizer), val_fraction=0.5)
    folder = prepare_files([tmp_path / "other.txt"], data, progress=False)
    assert answer(capsys, "eval", made, "--data", folder)["tokens"] == pytest.approx(len(TEXT) / 2, abs=5)


def test_convert_there_and_back_keeps_every_weight(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    told = answer(capsys, "convert", "to-hf", made, exported, "--checkpoint", "1")
    assert told["family"] == "mixtral"
    assert told["parameters"] == sum(tensor.numel() for tensor in StoredWeights(exported).values())
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == 256
    assert answer(capsys, "convert", "from-hf", exported, imported)["parameters"] == told["parameters"]
    options = ("--prompt", "green", "--tokens", "9")
    before = answer(capsys, "generate", made, *options, "--checkpoint", "1")
    assert answer(capsys, "generate", imported, *options)["samples"] == before["samples"]


def test_an_exported_run_loads_in_transformers(made: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    assert main(["convert", "to-hf", str(made), str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    saved = open_run(made)
    prompt = tokenizer("ten green", return_tensors="pt").input_ids
    assert prompt[0].tolist() == saved.tokenizer.encode("ten green")
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    end = saved.tokenizer.end_token
    [ours] = generate(saved.model, [prompt[0].tolist()], max_new_tokens=8, temperature=0, end_token=end)
    assert [token for token in theirs[0, prompt.size(1) :].tolist() if token != end] == ours


def test_a_dense_run_is_a_llama_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    config = TrainConfig(
        model=ModelConfig(vocab_size=257, d_model=32, layers=2, heads=4, kv_heads=2, init_std=0.2, moe=None),
        data=DataConfig(tokenizer="bytes", seq_len=32),
        log=LogConfig(dir=str(tmp_path / "run")),
    )
    model = build_decoder(config.model, config.router, single())
    write_run(config, model, byte_tokenizer(), "a test")
    first, back, second = tmp_path / "first", tmp_path / "back", tmp_path / "second"
    assert answer(capsys, "convert", "to-hf", tmp_path / "run", first)["family"] == "llama"
    assert answer(capsys, "convert", "from-hf", first, back)["family"] == "llama"
    answer(capsys, "convert", "to-hf", back, second)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    theirs = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    tokens_BS = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, given = model.logits(model(tokens_BS).hidden_BSD), theirs(input_ids=tokens_BS).logits
    torch.testing.assert_close(ours, given, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-hf", "RUN", "HERE"], "exists; name a new folder"),
        (["to-hf", "RUN", "out", "--family", "olmoe"], "model.qk_norm: none is not this family's full"),
        (["to-hf", "RUN", "out", "--family", "llama"], "4 experts are more than this family's null"),
        (["from-hf", "RUN", "out"], "config.json: cannot be read"),
        (["from-hf", "RUN", "out", "--checkpoint", "1"], "--checkpoint is for runs; from-hf reads it from the source"),
    ],
)
def test_convert_refuses(
    arguments: list[str], message: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "something").write_text("")
    places = {"RUN": str(made), "HERE": str(tmp_path), "out": str(tmp_path / "out")}
    assert message in complaint(capsys, "convert", *(places.get(argument, argument) for argument in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_slots_pictures_a_batch_before_and_after(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "slots.png"
    told = answer(capsys, "slots", made, "--ranks", "2", "--capacity-factor", "0.75", "--output", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    vanilla, rectified = told["vanilla"], told["rectified"]
    choices = vanilla["kept"] + vanilla["dropped"]
    assert vanilla["dropped"] > 0 < vanilla["padding"]
    assert rectified["kept"] + rectified["rectified"] + rectified["dropped"] == choices
    assert rectified["unserved"] == 0
    assert rectified["padding"] < vanilla["padding"] or rectified["filled"] == 0
    assert "use 2" in complaint(capsys, "slots", made, "--ranks", "3", "--output", picture)
    assert "use 0 to 1" in complaint(capsys, "slots", made, "--ranks", "2", "--layer", "2", "--output", picture)
    for factor, remedy in (("-1", "positive factor"), ("nan", "use for example 1.0"), ("1e300", "use at most 1000000")):
        said = complaint(capsys, "slots", made, "--capacity-factor", factor, "--output", picture)
        assert said.startswith("error: capacity_factor: ") and remedy in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (".", "is a folder; name a file, for example"),
        ("gone/slots.png", "there is no folder"),
        ("notes/slots.png", "there is no folder"),
        ("notes", "exists and is not a PNG picture"),
        (f"{'n' * 300}.png", "cannot be written (File name too long)"),
    ],
)
def test_slots_refuses_a_picture_that_it_could_not_write_before_anything_else(
    file: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").write_text("mine")
    assert message in complaint(capsys, "slots", tmp_path / "no run", "--output", tmp_path / file)
    assert (tmp_path / "notes").read_text() == "mine"


def test_slots_leaves_nothing_of_a_picture_that_it_cannot_finish(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = pytest.importorskip("matplotlib.figure")

    def fill_the_disk(self: Any, file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", fill_the_disk)
    said = complaint(capsys, "slots", made, "--output", tmp_path / "slots.png")
    assert "slots.png: cannot be written (No space left on device)" in said
    assert not list(tmp_path.iterdir())


def test_another_router_shares_the_weights(made: Path) -> None:
    model = open_run(made).model
    other = with_router(model, RouterConfig(top_k=1, capacity_factor=1.0))
    tokens = torch.arange(32).view(2, 16)
    assert other(tokens).routings[0].capacity == 8
    assert model(tokens).routings[0].capacity is None
    assert other.embedding.weight is model.embedding.weight
    assert not other.training
