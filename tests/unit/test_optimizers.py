"""Every optimizer that a configuration can name: it trains, resumes bit for bit, and refuses what it would ignore."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from wastenot.launch import optimizer_config
from wastenot.launch.config import DataConfig, LoopConfig, ScheduleConfig, TrainConfig
from wastenot.launch.errors import UserError
from wastenot.launch.optimizer import InTurn, make_optimizer, set_learning_rate
from wastenot.launch.optimizer_config import (
    AdapproxConfig,
    ApolloConfig,
    OptimizerConfig,
    refuse_state_of_others,
    what_is_missing,
)
from wastenot.launch.settings import dump_config, parse_config
from wastenot.launch.step import Stepper
from wastenot.launch.strict_yaml import parse_yaml
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.checkpoint import Checkpointer
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import single
from wastenot.parallel.training_state import load_training_state, training_state
from wastenot.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8
OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=1e-2),
    "adafactor": OptimizerConfig(name="adafactor", lr=1e-1),
    "adamw8bit": OptimizerConfig(name="adamw8bit", lr=1e-2),
    "adapprox": OptimizerConfig(
        name="adapprox",
        lr=3e-2,
        adapprox=AdapproxConfig(max_rank=0.5, rank_threshold=0.5, rank_every=3, true_error=True),
    ),
    "apollo": OptimizerConfig(name="apollo", lr=1e-2, apollo=ApolloConfig(rank=0.5, refresh_every=3)),
    "came": OptimizerConfig(name="came", lr=3e-3),
    "muon": OptimizerConfig(name="muon", lr=1e-2),
}
"""Apollo draws new projections before, at and after the step from which runs resume."""


class Windows:
    """Sample i repeats a pattern that depends on i: something to learn at once."""

    def take(self, first: int, count: int) -> np.ndarray:
        return np.stack([(np.arange(9) + i) % 7 for i in range(first, first + count)]).astype(np.int64)


def new_run(name: str) -> Stepper:
    if what_is_missing(name):
        pytest.skip(what_is_missing(name))
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=64, d_model=32, layers=1, heads=2, init_std=0.1, moe=MoEConfig(experts=4, d_expert=32)
        ),
        router=RouterConfig(top_k=1, normalize="none"),
        optimizer=OPTIMIZERS[name],
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        data=DataConfig(seq_len=8),
        train=LoopConfig(steps=STEPS, batch=4),
    )
    model = build_decoder(config.model, config.router, single())
    optimizer = make_optimizer(model, config.optimizer)
    return Stepper(config, single(), model, optimizer, Gradients(model, single(), 2**20), Windows())  # pyright: ignore[reportArgumentType]


def losses(run: Stepper, first: int, last: int) -> list[float]:
    results = [run.step(step, 4 * step, stop=False) for step in range(first, last)]
    assert all(result.applied for result in results)
    return [result.loss for result in results]


def experts(name: str) -> bool:
    return ".experts." in name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls_and_a_resumed_run_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = new_run(name)
    seen = losses(run, 0, STEPS // 2)
    checkpointer = Checkpointer(tmp_path, single())
    checkpointer.save(STEPS // 2, training_state(run.model, run.optimizer, single(), experts), {})
    seen += losses(run, STEPS // 2, STEPS)
    assert seen[-1] < 0.8 * seen[0]

    path = checkpointer.latest()
    assert path is not None
    for stepped_before in (False, True):
        again = new_run(name)
        if stepped_before:
            losses(again, 0, 1)
        load_training_state(path, again.model, again.optimizer, single(), experts)
        assert losses(again, STEPS // 2, STEPS) == seen[STEPS // 2 :]
        ends = [training_state(each.model, each.optimizer, single(), experts) for each in (run, again)]
        assert ends[0].keys() == ends[1].keys()
        assert all(tensor.equal(ends[1][key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_weight_is_stepped_by_one_group_and_only_matrices_decay(name: str) -> None:
    run = new_run(name)
    before = [p.detach().clone() for p in run.model.parameters()]
    losses(run, 0, 2)
    assert not any(old.equal(new) for old, new in zip(before, run.model.parameters(), strict=True))
    decay = {p: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(decay) == len(before)
    assert all(decay[p] == (0.1 if p.dim() >= 2 else 0.0) for p in run.model.parameters())


def test_the_schedule_reaches_every_group() -> None:
    for name in ("muon", "adamw8bit"):
        run = new_run(name)
        set_learning_rate(run.optimizer, 0.5)
        assert [float(group["lr"]) for group in run.optimizer.param_groups] == [0.5] * len(run.optimizer.param_groups)
        losses(run, 0, 1)


def test_muon_takes_hidden_matrices_and_nothing_else() -> None:
    run = new_run("muon")
    losses(run, 0, 1)
    names = {p: name for name, p in run.model.named_parameters()}
    taken = {names[p] for p, state in run.optimizer.state.items() if "momentum_buffer" in state}
    attention = {f"blocks.0.attention.{part}.weight" for part in ("q", "k", "v", "out")}
    assert taken == attention | {"blocks.0.ffn.router.weight"}
    assert all("exp_avg" in state for p, state in run.optimizer.state.items() if names[p] not in taken)


def test_eight_bit_moments_take_a_byte_and_their_scales(tmp_path: Path) -> None:
    run = new_run("adamw8bit")
    losses(run, 0, 1)
    state = training_state(run.model, run.optimizer, single(), experts)
    prefix = "optimizer.blocks.0.ffn.experts.gate_up.exp_avg"
    parts = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(f"{prefix}#")}
    shapes = {part: (tensor.dtype, list(tensor.shape)) for part, tensor in parts.items()}
    assert shapes == {"#codes": (torch.uint8, [4, 64, 32]), "#scale": (torch.float32, [4, 8])}


def test_apollo_keeps_moments_of_projected_gradients() -> None:
    run = new_run("apollo")
    losses(run, 0, 1)
    by_name = {name: run.optimizer.state[p] for name, p in run.model.named_parameters()}
    assert list(by_name["blocks.0.attention.q.weight"]["exp_avg"].shape) == [32, 16]
    assert list(by_name["blocks.0.ffn.experts.down"]["exp_avg"].shape) == [4, 32, 32]
    assert "projector" not in by_name["embedding.weight"]


REFUSED = [
    ("optimizer.name=adafactor -s optimizer.beta1=0.8", "beta1", "0.8 has no effect with name: adafactor; use 0.9"),
    ("optimizer.name=adafactor -s optimizer.beta2=0.99", "beta2", "0.99 has no effect with name: adafactor; use 0.95"),
    ("optimizer.name=came -s optimizer.eps=1e-6", "eps", "1e-06 has no effect with name: came; use 1e-08"),
    ("optimizer.adapprox.max_rank=0.5", "adapprox", "no effect with name: adamw; use name: adapprox, or none"),
    (
        "optimizer.name=muon -s optimizer.apollo.rank=0.5",
        "apollo",
        "no effect with name: muon; use name: apollo, or none",
    ),
    ("optimizer.adapprox.max_rank=2", "adapprox.max_rank", "2.0 is outside (0, 1]; use 1.0"),
    ("optimizer.adapprox.rank_threshold=0", "adapprox.rank_threshold", "outside (0, 1); use for example 0.01"),
    ("optimizer.adapprox.rank_every=0", "adapprox.rank_every", "use 1 or more"),
    ("optimizer.adapprox.clip_threshold=0", "adapprox.clip_threshold", "use for example 1.0"),
    ("optimizer.adapprox.momentum=int4", "adapprox.momentum", "nearest: int8"),
    (
        "optimizer.name=adapprox -s optimizer.adapprox={guidance: true, momentum: none}",
        "adapprox.guidance",
        "with momentum: none; use false",
    ),
    (
        "optimizer.name=adapprox -s optimizer.adapprox.momentum=none -s optimizer.beta1=0.8",
        "beta1",
        "0.8 has no effect with momentum: none; use 0.9",
    ),
    ("optimizer.apollo.rank=0", "apollo.rank", "0.0 is outside (0, 1]; use 0.25"),
    ("optimizer.apollo.refresh_every=0", "apollo.refresh_every", "use 1 or more"),
    ("optimizer.name=mouon", "name", "nearest: muon"),
    (
        "optimizer.name=adamw8bit -s model.d_model=72 -s model.moe.d_expert=100 -s parallel.expert=2",
        "name",
        "widths whose product",
    ),
]


@pytest.mark.parametrize(("settings", "path", "remedy"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_has_no_effect_is_refused_in_one_line(
    settings: str, path: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    arguments = [word for setting in settings.split(" -s ") for word in ("-s", setting)]
    assert main(["config", str(tmp_path / "run.yaml"), *arguments]) == 2
    message = capsys.readouterr().err.removesuffix("\n")
    assert "\n" not in message
    assert f": optimizer.{path}: " in message
    assert remedy in message


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("came", "came needs came_pytorch; pip install 'wastenot[optimizers]', or use adamw"),
        ("adamw8bit", "adamw8bit needs torchao; pip install 'wastenot[optimizers]', or use adamw"),
        (
            "apollo",
            "apollo needs apollo_torch, bitsandbytes, transformers; pip install 'wastenot[apollo]', or use adamw",
        ),
    ],
)
def test_a_missing_package_is_named_before_anything_starts(
    name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimizer_config, "find_spec", lambda module: None)
    path = tmp_path / "run.yaml"
    path.write_text(f"optimizer: {{name: {name}}}")
    assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: optimizer.name: {sentence}\n"
    with pytest.raises(UserError, match="pip install"):
        make_optimizer(torch.nn.Linear(1, 1), OptimizerConfig(name=name))  # pyright: ignore[reportArgumentType]


def test_a_saved_configuration_parses_where_its_packages_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_config, "find_spec", lambda module: None)
    config = TrainConfig(optimizer=OPTIMIZERS["apollo"])
    assert parse_config(parse_yaml(dump_config(config), "here"), "here") == config


def test_a_checkpoint_of_eight_bit_moments_is_refused_by_another_optimizer(tmp_path: Path) -> None:
    run = new_run("adamw8bit")
    losses(run, 0, 1)
    checkpointer = Checkpointer(tmp_path, single())
    checkpointer.save(1, training_state(run.model, run.optimizer, single(), experts), {})
    path = checkpointer.latest()
    assert path is not None
    other = new_run("adamw")
    weights = [p.detach().clone() for p in other.model.parameters()]
    with pytest.raises(ValueError, match="which AdamW does not know; use the optimizer that it was saved with"):
        load_training_state(path, other.model, other.optimizer, single(), experts)
    assert all(old.equal(new) for old, new in zip(weights, other.model.parameters(), strict=True))


def test_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    saved = {"name": "adamw", "lr": 1e-3}
    refuse_state_of_others(OptimizerConfig(), saved, tmp_path)
    refuse_state_of_others(OptimizerConfig(), {}, tmp_path)
    with pytest.raises(ValueError, match=r"name: adapprox cannot go on from the state of adamw in .*; use adamw"):
        refuse_state_of_others(OptimizerConfig(name="adapprox"), saved, tmp_path)
    saved = {"name": "adapprox", "adapprox": {"momentum": "int8"}}
    with pytest.raises(ValueError, match=r"momentum: fp32 cannot go on from the int8 of .*; use int8"):
        refuse_state_of_others(OptimizerConfig(name="adapprox"), saved, tmp_path)
    saved = {"name": "adapprox", "adapprox": {"momentum": "fp32"}}
    refuse_state_of_others(OptimizerConfig(name="adapprox"), saved, tmp_path)
    measured = OptimizerConfig(name="adapprox", adapprox=AdapproxConfig(true_error=True))
    with pytest.raises(ValueError, match=r"true_error: true cannot go on from the false of .*; use false"):
        refuse_state_of_others(measured, saved, tmp_path)


def test_parts_of_a_composite_go_on_with_what_was_loaded() -> None:
    def made() -> tuple[list[torch.nn.Parameter], InTurn]:
        both = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))]
        return both, InTurn(torch.optim.SGD(both[:1], lr=0.5, momentum=0.9), torch.optim.AdamW(both[1:], lr=0.5))

    (parameters, optimizer), (others, again) = made(), made()
    for parameter in (*parameters, *others):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for parameter, other in zip(parameters, others, strict=True):
            other.copy_(parameter)
    set_learning_rate(again, 0.1)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    again.step()
    assert all(parameter.equal(other) for parameter, other in zip(parameters, others, strict=True))
