"""A streamed model whose experts two ranks share is the model of one process, whoever has how many tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spawned import run_ranks
from torch import Tensor

from wastenot.launch.config import DataConfig, LogConfig, TrainConfig
from wastenot.launch.run_folder import RunFolder
from wastenot.launch.saved_run import write_run
from wastenot.launch.streamed import open_streamed
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.compress.forward import moe_output, run_layers
from wastenot.moe.compress.plan import DropPlan, Shape
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.checkpoint import Checkpointer
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import expert_parameter_names
from wastenot.parallel.mesh import Mesh, make_mesh, single
from wastenot.parallel.training_state import training_state

TOKENS = torch.randint(0, 96, (5, 13), generator=torch.Generator().manual_seed(1))
CUTS = ([0, 5, 5], [0, 2, 5])
"""Where each rank's sequences begin and end: once the second has none, once they have different numbers of batches."""

MODEL = ModelConfig(
    vocab_size=257, d_model=32, layers=3, heads=4, init_std=0.2, moe=MoEConfig(experts=8, d_expert=24, shared_experts=1)
)
ROUTER = RouterConfig(top_k=3, score="sigmoid", scale=1.5)


def plans(shape: Shape) -> list[DropPlan | None]:
    """None, and one plan of either semantics that keeps a number of experts that two ranks can share."""
    gone, left = {1: (0, 5)}, (7, 1, 4, 2, 6, 3)
    base = {"base": "", "shape": shape, "layers": (2,), "experts": gone}
    return [None, DropPlan(**base, order={1: left}), DropPlan(**base, semantics="skip", order={1: (*left, 0, 5)})]


def compute(mesh: Mesh, folder: Path, first: int, end: int) -> tuple[list[Tensor], Any, Any]:
    """Logits of these sequences under each plan; what layer 1 chose for their tokens; what its experts here saw."""
    model = open_streamed(folder)
    own = TOKENS[first:end]
    logits = [model.logits(run_layers(model, own, plan, mesh, batch=2)) for plan in plans(model.shape)]
    layer = model.layer(1, share=(mesh.expert.rank, mesh.expert.size))
    x_TD = layer.norm(model.embed(own)).flatten(0, 1)
    choice = layer.route(x_TD)
    seen: list[Any] = []
    y_TD = moe_output(layer, x_TD, choice, mesh, lambda *given: seen.append(given))
    return [*logits, y_TD], (x_TD, choice.experts_TK, choice.weights_TK), seen[0]


def on_ranks(rank: int, world: int, folders: list[Path]) -> list[Any]:
    mesh = make_mesh(ParallelConfig(expert=world), "cpu")
    return [compute(mesh, folder, *cut[rank : rank + 2]) for folder in folders for cut in CUTS]


def save_on_ranks(rank: int, world: int, folder: Path) -> None:
    mesh = make_mesh(ParallelConfig(expert=world), "cpu")
    model = build_decoder(MODEL, ROUTER, mesh, seed=1)
    checkpoints = Checkpointer(RunFolder(folder).checkpoints, mesh, asynchronous=False)
    checkpoints.save(7, training_state(model, None, mesh, expert_parameter_names(model).__contains__), {})
    checkpoints.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of ours with the same weights twice: step 0 of one process, step 7 of two ranks."""
    folder = tmp_path_factory.mktemp("native") / "run"
    config = TrainConfig(
        model=MODEL,
        router=ROUTER,
        data=DataConfig(tokenizer="bytes", seq_len=16),
        log=LogConfig(dir=str(folder)),
    )
    write_run(config, build_decoder(MODEL, ROUTER, single(), seed=1), byte_tokenizer(), "a test")
    run_ranks(2, save_on_ranks, folder)
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6 * float(wanted.abs().max()))


def test_two_ranks_compute_what_one_process_does(stock: Path, run: Path) -> None:
    folders = [stock, run]
    both = run_ranks(2, on_ranks, folders, timeout=240.0)
    for number, folder in enumerate(folders):
        alone, choice, _ = compute(single(), folder, 0, 5)
        for place, (mine, theirs) in enumerate(zip(*both, strict=True)):
            if place // len(CUTS) != number:
                continue
            for found, wanted in zip(zip(mine[0], theirs[0], strict=True), alone, strict=True):
                same(torch.cat(found), wanted)
            for found, wanted in zip(zip(mine[1], theirs[1], strict=True), choice, strict=True):
                torch.testing.assert_close(torch.cat(found), wanted)
            check_seen([mine, theirs])


def check_seen(ranks: list[Any]) -> None:
    """Every expert was seen with the tokens of all ranks, rank by rank, and with the weights they chose."""
    share = 4
    for owner, (_, _, (rows_RD, _, _, gates_R, offsets_e)) in enumerate(ranks):
        assert len(offsets_e) == share
        for place, (first, end) in enumerate(zip([0, *offsets_e.tolist()], offsets_e.tolist(), strict=False)):
            rows, gates = [], []
            for _, (x_TD, experts_TK, weights_TK), _ in ranks:
                token_T, place_T = (experts_TK == owner * share + place).nonzero(as_tuple=True)
                rows.append(x_TD[token_T])
                gates.append(weights_TK[token_T, place_T])
            assert torch.equal(rows_RD[first:end], torch.cat(rows))
            assert torch.equal(gates_R[first:end], torch.cat(gates))


def test_a_fingerprint_does_not_tell_layouts_of_experts_apart(run: Path) -> None:
    files = {step: len(list(run.glob(f"checkpoints/step-{step:08d}/*.safetensors"))) for step in (0, 7)}
    assert files == {0: 1, 7: 2}
    assert open_streamed(run, step=0).fingerprint == open_streamed(run, step=7).fingerprint
