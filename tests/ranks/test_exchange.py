"""The all-to-all of rows: right rows, right gradients, whole or cut, and open to work in between."""

from __future__ import annotations

import pytest
import torch
from spawned import run_ranks

from wastenot.parallel.collectives import Splits, start_all_to_all, tune_pieces
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import make_mesh


class Log:
    """Writes every event down."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.num_bytes = 0

    def collective_entered(self, name: str, num_bytes: int) -> None:
        self.events.append(f"+{name}")
        self.num_bytes += num_bytes

    def collective_left(self, name: str, waited_s: float, hidden: float = 0.0) -> None:
        assert waited_s >= 0
        self.events.append(f"-{name}")


def pair_rows(world: int, empty: bool) -> list[list[int]]:
    """Rows from each rank to each rank, uneven, some zero."""
    return [[0 if empty else (3 * a + 5 * b) % 7 for b in range(world)] for a in range(world)]


def exchange(rank: int, world: int, pieces: int, empty: bool) -> None:
    mesh = make_mesh(ParallelConfig(expert=world), "cpu")
    table = pair_rows(world, empty)
    splits = Splits(table[rank], [row[rank] for row in table], pieces)
    # Row content says where it comes from and where it goes.
    rows = torch.cat(
        [torch.tensor([[rank, to, i, 1.0]]).expand(1, 4) for to in range(world) for i in range(table[rank][to])]
        or [torch.zeros(0, 4)]
    ).requires_grad_()
    got = start_all_to_all(rows, splits, mesh.expert, "dispatch", mesh.recorder).wait()
    expected = [[float(a), float(rank), float(i), 1.0] for a in range(world) for i in range(table[a][rank])]
    assert got.tolist() == expected
    # The gradient of a row returns to the rank it came from.
    marks = torch.tensor([[10.0 * rank + i] * 4 for i in range(got.size(0))]).view(-1, 4)
    (grad,) = torch.autograd.grad((got * marks).sum(), rows)
    sent_before = [sum(table[a][to] for a in range(rank)) for to in range(world)]
    returned = [10.0 * to + sent_before[to] + i for to in range(world) for i in range(table[rank][to])]
    assert grad[:, 0].tolist() == returned


@pytest.mark.parametrize("pieces", [1, 3, 8])
@pytest.mark.parametrize("world", [2, 4])
def test_rows_and_gradients_arrive_where_they_belong(world, pieces):
    run_ranks(world, exchange, pieces, False)


def test_ranks_without_rows_take_part():
    run_ranks(2, exchange, 1, True)
    run_ranks(2, exchange, 3, True)


def overlap(rank: int, world: int) -> list[str]:
    log = Log()
    mesh = make_mesh(ParallelConfig(expert=world), "cpu", log)
    log.events.clear()
    rows = torch.ones(2 * world, 3, requires_grad=True)
    splits = Splits([2] * world, [2] * world)

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            log.events.append("work")
            return x * 2

        @staticmethod
        def backward(ctx, *grads):
            log.events.append("work")
            return grads[0] * 2

    travelling = start_all_to_all(rows, splits, mesh.expert, "dispatch", mesh.recorder)
    meanwhile = Mark.apply(rows)
    arrived = travelling.wait()
    assert isinstance(meanwhile, torch.Tensor)
    (arrived.sum() + meanwhile.sum()).backward()
    assert rows.grad is not None
    assert (rows.grad == 3).all()
    assert log.num_bytes == 2 * 2 * 3 * 4 * (world - 1), "forward and backward, to others only"
    return log.events


def test_work_between_start_and_wait_runs_while_rows_travel_in_both_directions():
    expected = ["+dispatch", "work", "-dispatch", "+dispatch-gradient", "work", "-dispatch-gradient"]
    assert run_ranks(2, overlap) == [expected] * 2


def tuned(rank: int, world: int) -> int:
    mesh = make_mesh(ParallelConfig(expert=world), "cpu")
    return tune_pieces(mesh, probe_bytes=2**18, rounds=1)


def test_all_ranks_agree_on_the_size_of_a_piece():
    found = run_ranks(4, tuned)
    assert len(set(found)) == 1
    assert found[0] in (0, 256 * 1024, 512 * 1024)


def wrong_layout(rank: int, world: int) -> str:
    with pytest.raises(ValueError, match="does not make 2 rank") as error:
        make_mesh(ParallelConfig(expert=4), "cpu")
    return str(error.value)


def test_a_layout_that_does_not_fit_the_world_is_explained():
    assert "divides 2" in run_ranks(2, wrong_layout)[0]
