"""transformers.Trainer with what is ours inside: Rectify-Router, recompute segments, Adapprox by name."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stock_models import CONFIGS
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from wastenot.launch.peak_memory import peak_bytes
from wastenot.moe.adapters.huggingface import (
    name_parameters_,
    optimizer,
    recompute_,
    rectify_,
    routings_of,
    unrecompute_,
    unrectify_,
)
from wastenot.parallel.optim import Adapprox
from wastenot.parallel.recomputation import KEEP, Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, HALF, LENGTH = 12, 6, 16


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=0.02,
        output_router_logits=True,
        attention_dropout=0.1,
    )
    return MixtralForCausalLM(config)


def counting() -> list[dict[str, Tensor]]:
    """Sequences whose next token follows from the last."""
    starts = torch.arange(48).unsqueeze(1)
    tokens_BS = (starts + (1 + starts % 3) * torch.arange(LENGTH)) % 64
    return [{"input_ids": tokens_S, "labels": tokens_S} for tokens_S in tokens_BS]


def trained(
    model: Any, folder: Path, *, recompute: bool = False, resume: Path | None = None
) -> tuple[Trainer, list[float]]:
    """`model` after `STEPS` steps of Trainer, which saved a checkpoint in the middle, and the losses."""
    rectify_(model, capacity_factor=0.75, ranks=2)
    if recompute:
        recompute_(model, debug=True)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=2,
        logging_steps=1,
        save_steps=HALF,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    chosen = optimizer("adapprox", args, rank_every=2, max_rank=6)
    trainer = Trainer(model, args, train_dataset=counting(), optimizer_cls_and_kwargs=chosen)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[float], Path]:
    folder = tmp_path_factory.mktemp("plain")
    return *trained(mixtral(), folder), folder


def equal(found: Any, expected: Any) -> bool:
    """Whether two values of tensors, numbers and containers are the same bits."""
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(equal(a, b) for a, b in zip(found, expected, strict=True))
    return found == expected


def test_trainer_lowers_the_loss_of_a_rectified_mixtral_under_adapprox(plain):
    trainer, losses, _ = plain
    assert losses[-1] < 0.8 * losses[0], losses
    inner = trainer.optimizer.optimizer
    assert type(inner) is Adapprox
    assert {group["weight_decay"] for group in inner.param_groups} == {0.1, 0.0}
    assert inner.param_groups[0]["betas"] == (0.9, 0.999)
    name_parameters_(inner, trainer.model)
    report = {each.name: each for each in inner.report()}
    assert len(report["model.layers.1.mlp.experts.gate_up_proj"].ranks) == 4
    with routings_of(trainer.model) as routings:
        trainer.model.train()(**{name: tensor[None] for name, tensor in counting()[0].items()})
    assert len(routings) == 2


def test_recomputation_changes_no_bit_of_the_weights(plain, tmp_path):
    trainer, losses, _ = plain
    again, losses_again = trained(mixtral(), tmp_path, recompute=True)
    assert losses_again == losses
    assert sum(again.model.model.layers[0].mlp.recomputation.spent.take()) > 0
    assert equal(again.model.state_dict(), trainer.model.state_dict())


def test_a_resumed_training_goes_on_bit_for_bit(plain, tmp_path):
    trainer, losses, folder = plain
    checkpoint = folder / f"checkpoint-{HALF}"
    # transformers 5.23 itself leaves out weights that have other names on disk, and these are the experts.
    model = MixtralForCausalLM.from_pretrained(checkpoint)
    resumed, losses_after = trained(model, tmp_path, resume=checkpoint)
    assert losses_after[HALF:] == losses[HALF:]
    assert equal(resumed.model.state_dict(), trainer.model.state_dict())
    ours, theirs = resumed.optimizer.state_dict(), trainer.optimizer.state_dict()
    assert equal(ours["state"], theirs["state"])


def test_what_trainer_saves_stock_transformers_loads(plain, tmp_path):
    trainer, _, _ = plain
    trainer.save_model(str(tmp_path))
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is MixtralForCausalLM
    assert equal(back.state_dict(), trainer.model.state_dict())


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    # Trainer changes the config of its model.
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).train()


def put_dropout(model: Any) -> Any:
    """Dropout within attention and within the experts' block, as LoRA's is, of which no config says anything."""
    for layer in model.model.layers:
        layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj, nn.Dropout(0.3))
        inner = getattr(layer.mlp, "gate", layer.mlp)
        inner.register_module("lora_dropout", nn.Dropout(0.3))
        inner.register_forward_pre_hook(lambda module, args: (module.lora_dropout(args[0]), *args[1:]))
    return model


def count_attention(model: Any) -> list[int]:
    """How often each layer's attention is computed from now on."""
    counts = [0] * len(model.model.layers)

    def count(i: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            counts[i] += 1

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(count(i))
    return counts


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    tokens_BS = torch.arange(64).view(4, 16) % 60
    model(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_other_families_train_under_trainer(family, tmp_path):
    trainer, losses = trained(model_of(family), tmp_path, recompute=True)
    assert losses[-1] < 0.9 * losses[0], losses
    trainer.save_model(str(tmp_path / "saved"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert equal(back.state_dict(), trainer.model.state_dict())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_segments_give_the_same_gradients_and_can_be_taken_back(family):
    model = put_dropout(rectify_(model_of(family), capacity_factor=0.7))
    counts = count_attention(model)
    classes = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    kept = gradients(model)
    assert counts == [1, 1, 1]
    recomputation = recompute_(model, debug=True)
    assert equal(gradients(model), kept)
    assert counts == [3, 3, 3], "each layer's attention once more in backward, though config.use_cache is true"
    assert sum(recomputation.spent.take()) > 0
    assert list(model.state_dict()) == names
    recomputation.schedule = Schedule(frozenset({"1.mlp", "2.attention"}))
    assert equal(gradients(model), kept)
    recomputation.schedule = KEEP
    recomputation.spent.take()
    assert equal(gradients(model), kept)
    assert sum(recomputation.spent.take()) == 0

    recomputation.schedule = Schedule(frozenset({"0.mlp"}))
    twin = copy.deepcopy(model)
    assert equal(gradients(twin), kept)
    assert sum(recomputation.spent.take()) == 0, "a copy has a recomputation of its own"
    unrecompute_(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.train()(input_ids=torch.tensor([[1, 2]])).past_key_values is not None
    assert equal(gradients(model), kept)
    assert unrectify_(model).training


def test_segments_hold_less_memory():
    model = MixtralForCausalLM(MixtralConfig(**(mixtral().config.to_dict() | {"num_hidden_layers": 6})))
    gradients(model)
    kept = peak_bytes(lambda: gradients(model))
    recompute_(model)
    assert peak_bytes(lambda: gradients(model)) < 0.7 * kept


def test_passes_that_fill_a_cache_go_past_segments_and_training_fills_none_unasked():
    model = mixtral().eval()
    inputs_BS = torch.tensor([[1, 2, 3]])
    expected = model.generate(inputs_BS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    recompute_(nn.ModuleDict({"decoder": model}))
    recomputation = model.model.layers[0].self_attn.recomputation
    assert model.generate(inputs_BS, max_new_tokens=5, do_sample=False, pad_token_id=0).equal(expected)
    counts = count_attention(model)
    for train, asked, is_filled in ((False, {}, True), (True, {"use_cache": True}, True), (True, {}, False)):
        counts[:] = [0, 0]
        recomputation.begin(model.train(train))
        returned = model(input_ids=inputs_BS, **asked)
        cache = returned.past_key_values
        assert (cache is not None) == is_filled
        returned.logits.sum().backward()
        assert counts == ([1, 1] if is_filled else [2, 2])
        assert cache is None or cache.get_seq_length() == 3
    again = model.model(inputs_BS, past_key_values=DynamicCache(config=model.config))
    assert again.past_key_values.get_seq_length() == 3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning")
def test_what_cannot_be_is_refused_in_one_line():
    def said(call: Any, *args: Any, **options: Any) -> str:
        with pytest.raises((ValueError, TypeError)) as caught:
            call(*args, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    args = SimpleNamespace(learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8)
    assert "nearest: adapprox" in said(optimizer, "adaprox", args)
    assert "max_rank: 2.0 is neither" in said(optimizer, "adapprox", args, max_rank=2.0)
    assert "ranks" in said(optimizer, "adapprox", args, ranks=2)
    model = mixtral()
    assert "'moe' is not one of attention norm" in said(recompute_, model, parts=["moe"])
    assert "Linear has no layers" in said(recompute_, nn.Linear(2, 2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert "gradient_checkpointing: " in said(recompute_, model)
    model.gradient_checkpointing_disable()
    recompute_(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert "gradient_checkpointing: " in said(model, input_ids=torch.tensor([[1, 2]]))
    model.gradient_checkpointing_disable()
    assert "segments already" in said(recompute_, model)
    assert "call rectify_ before recompute_" in said(rectify_, model)
    hooked = mixtral()
    hooked.model.layers[1].self_attn.forward = hooked.model.layers[1].self_attn.forward
    assert "1.attention: its forward was replaced" in said(recompute_, hooked)
    rectified = rectify_(mixtral())
    recompute_(rectified)
    assert "undo that first" in said(unrectify_, rectified)


def test_checkpoints_need_no_method_and_nothing_of_transformers():
    """The one place to import from imports each adapter when it is asked for."""
    code = (
        "import sys; import wastenot.moe.adapters.huggingface as found\n"
        "methods = {'transformers', 'wastenot.parallel.optim', 'wastenot.moe.rectify'}\n"
        "assert not methods & sys.modules.keys()\n"
        "found.rectify_, found.optimizer, found.recompute_, found.routings_of\n"
        "assert 'transformers' not in sys.modules\n"
        "print(hasattr(found, 'rectify'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
