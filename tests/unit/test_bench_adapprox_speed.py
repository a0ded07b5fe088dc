"""The `adapprox-speed` benchmark on parameters so small that only what it reports matters."""

from __future__ import annotations

import pytest
import torch

from wastenot.parallel.optim import Adapprox
from wastenot.tools.bench import adapprox_speed
from wastenot.tools.bench.adapprox_speed import BASE, factor_share, measure, measure_training
from wastenot.tools.bench.adapprox_speed_cases import Shapes
from wastenot.tools.bench.cases import Case

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_optimizer_has_a_row_with_its_rank_and_its_ratio_to_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapprox_speed, "CYCLE", 2)
    case = Shapes("small", ((80, 64), (2, 72, 64), (5,)))
    rows = {row["contender"]: row for row in measure(case, rounds=2, budget_s=60, say=lambda text: None)}
    assert rows[BASE]["ratio"] == 1
    assert rows[BASE]["state_bytes"] == rows["AdamW fused"]["state_bytes"]
    assert {row["parameters"] for row in rows.values()} == {80 * 64 + 2 * 72 * 64 + 5}
    assert [rows[f"warm, rank {rank}"]["rank"] for rank in (1, 4, 16)] == [1, 4, 16]
    assert rows["gaussian, rank 16"]["rank"] == rows["warm, default rank 16"]["rank"] == 16
    assert all(0 < row["factor_share"] < 1 for name, row in rows.items() if "rank" in name)
    assert rows["warm, rank 16, none"]["state_bytes"] < rows["warm, rank 16, int8"]["state_bytes"]
    [goal] = adapprox_speed._goals(case, list(rows.values()))
    assert goal.value == rows["warm, rank 16"]["ratio"]


def test_a_training_step_is_timed_with_both_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapprox_speed.ModelConfig(
        vocab_size=64, d_model=32, layers=1, heads=2, moe=adapprox_speed.MoEConfig(experts=2, d_expert=32)
    )
    monkeypatch.setattr(adapprox_speed, "TRAINING", Case(name="tiny", model=model, top_k=2, batch=4, seq_len=8))
    row = measure_training(rounds=1, say=lambda text: None)
    assert row["tokens"] == 32
    assert row["ratio"] > 0 and row["ms"] > row["adapprox_ms"] > 0 and row["adamw_ms"] > 0
    assert 1 <= row["rank"] <= 16


def test_the_share_of_factors_is_larger_at_a_larger_rank() -> None:
    shares = []
    for rank in (1, 60):
        parameter = torch.nn.Parameter(torch.zeros(256, 256))
        parameter.grad = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
        optimizer = Adapprox([parameter], max_rank=rank, rank_threshold=0.0)
        optimizer.step()
        shares.append(factor_share(optimizer))
    assert 0 < shares[0] < shares[1] < 1
