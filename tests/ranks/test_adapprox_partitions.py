"""Adapprox under engines that cut parameters into flat partitions is the Adapprox of whole parameters."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import run_ranks
from torch import Tensor, nn

from wastenot.parallel.optim import Adapprox

OPTIONS = {
    "lr": 0.02,
    "betas": (0.9, 0.9),
    "weight_decay": 0.1,
    "max_rank": 0.4,
    "rank_threshold": 0.05,
    "rank_every": 3,
    "seed": 3,
}
STEPS = 12


class Mixture(nn.Module):
    """Matrices, vectors, and a stack of experts; sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(13, 31)
        self.experts = nn.Parameter(torch.randn(3, 31, 17) * 0.3)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(17))
        self.last = nn.Linear(17, 29)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        mixed = torch.einsum("bm,emn->ben", hidden, self.experts).tanh().mean(1)
        return self.last(mixed * self.scale)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 13, generator=draw), torch.randn(8, 29, generator=draw)


def loss_of(model: Any, rank: int, step: int) -> Tensor:
    x, y = batch(rank, step)
    return (model(x) - y).square().mean()


def whole(world: int) -> tuple[list[float], dict[str, tuple[int, ...]], int]:
    """Losses, ranks and bytes of state of plain Adapprox, of the mean of all ranks' gradients."""
    model = Mixture()
    optimizer = Adapprox(model.named_parameters(), **OPTIONS)
    losses: list[float] = []
    for step in range(STEPS):
        parts = [loss_of(model, rank, step) / world for rank in range(world)]
        for part in parts:
            part.backward()
        losses.append(torch.stack(parts).sum().item())
        optimizer.step()
        optimizer.zero_grad()
    report = optimizer.report()
    return losses, {each.name: each.ranks for each in report}, sum(each.allocated_bytes for each in report)


STAGES: dict[int, dict[str, Any]] = {
    1: {},
    2: {"round_robin_gradients": True},
    3: {"stage3_param_persistence_threshold": 0, "sub_group_size": 900},
}


def under_zero(rank: int, world: int, path: str) -> Any:
    # DeepSpeed's own warnings are not ours to make errors of.
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed

    from wastenot.parallel.optim.zero import follow_zero

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)

    def start(stage: int) -> Any:
        model = Mixture()
        config = {
            "train_micro_batch_size_per_gpu": 8,
            # Buckets of the usual size are gigabytes, which deterministic torch fills with NaN at every step.
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 4000, **STAGES[stage]},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = Adapprox(model.named_parameters(), **OPTIONS)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return engine

    def train(engine: Any, steps: range) -> list[float]:
        losses: list[float] = []
        for step in steps:
            loss = loss_of(engine, rank, step)
            engine.backward(loss)
            engine.step()
            total = loss.detach() / world
            dist.all_reduce(total)
            losses.append(total.item())
        return losses

    with pytest.raises(RuntimeError, match="stands in the place of the matrices"):
        train(start(1), range(1))
    found: dict[int, Any] = {}
    for stage in STAGES:
        engine = start(stage)
        optimizer = follow_zero(engine)
        losses = train(engine, range(8))
        engine.save_checkpoint(f"{path}/{stage}")
        losses += train(engine, range(8, STEPS))
        again = start(stage)
        follow_zero(again)
        again.load_checkpoint(f"{path}/{stage}")
        assert train(again, range(8, STEPS)) == losses[8:], stage
        report = optimizer.report()
        found[stage] = losses, {each.name: each.ranks for each in report}, sum(each.allocated_bytes for each in report)
    return found


def test_under_zero_losses_and_ranks_are_those_of_whole_parameters(tmp_path: Path):
    expected, ranks, num_bytes = whole(2)
    first, second = run_ranks(2, under_zero, str(tmp_path))
    for stage in STAGES:
        (losses, *own), (_, *other) = first[stage], second[stage]
        assert losses == expected, stage
        assert own[0].keys().isdisjoint(other[0]), stage
        assert own[0] | other[0] == ranks, stage
        assert own[1] + other[1] == num_bytes, stage
        assert min(own[1], other[1]) > num_bytes / 3, stage
