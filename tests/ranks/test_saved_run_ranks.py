"""A run that two ranks trained is, in one process, the model they had: same loss, drops included."""

from __future__ import annotations

from pathlib import Path

import pytest
from spawned import run_ranks

from wastenot.launch.config import DataConfig, LogConfig, LoopConfig, TrainConfig
from wastenot.launch.corpus import prepare_files
from wastenot.launch.evaluate import Evaluation, evaluate
from wastenot.launch.run_folder import RunFolder
from wastenot.launch.saved_run import open_run
from wastenot.launch.shards import TokenShards
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.checkpoint import Checkpointer
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import expert_parameter_names
from wastenot.parallel.mesh import make_mesh
from wastenot.parallel.training_state import training_state


def save_and_evaluate(rank: int, world: int, config: TrainConfig, folder: Path) -> Evaluation:
    mesh = make_mesh(ParallelConfig(expert=world), "cpu")
    model = build_decoder(config.model, config.router, mesh)
    checkpoints = Checkpointer(RunFolder(config.log.dir).checkpoints, mesh, asynchronous=False)
    checkpoints.save(1, training_state(model, None, mesh, expert_parameter_names(model).__contains__), {})
    checkpoints.close()
    return evaluate(model, TokenShards.open(folder, "val"), mesh, seq_len=16, batch=4)


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_the_loss_is_that_of_the_ranks(capacity_factor: float | None, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i} men went to mow, went to mow a meadow.\n" for i in range(60)))
    data = DataConfig(dir=str(tmp_path / "data"), tokenizer="bytes", seq_len=16, val_fraction=0.2)
    folder = prepare_files([tmp_path / "text.txt"], data, progress=False)
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=257, d_model=32, layers=2, heads=4, init_std=0.2, moe=MoEConfig(experts=4, d_expert=16)
        ),
        router=RouterConfig(top_k=2, capacity_factor=capacity_factor, jitter=0.01),
        parallel=ParallelConfig(expert=2),
        data=data,
        train=LoopConfig(batch=4, eval_batch=4),
        log=LogConfig(dir=str(tmp_path / "run")),
    )
    run = RunFolder(config.log.dir)
    run.prepare(config, sorted(folder.glob("tokenizer*.json")))
    first, second = run_ranks(2, save_and_evaluate, config, folder)
    assert first == second
    saved = open_run(run.path)
    alone = evaluate(saved.model, TokenShards.open(folder, "val"), saved.mesh, seq_len=16, batch=4)
    assert alone.tokens == first.tokens
    assert alone.loss == pytest.approx(first.loss, rel=1e-6)
    assert saved.config == config
