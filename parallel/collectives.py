"""Collectives over one axis, announced to the recorder; those that carry activations are differentiable.

All-to-all of rows is asynchronous in both directions and cut to suit the link: forward starts the exchange and
returns; `Exchange.wait` hands out the rows. Backward mirrors it: the gradient's exchange starts where forward waited
and is waited for where forward started, so that whatever autograd has to do between the two (a shared expert, say)
runs while the gradients travel.

`start_gather` and `start_scatter` are the two halves of tensor parallelism, each the other's gradient.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .events import Recorder
from .mesh import Axis, Mesh
from .ranges import named
from .recomputation import During, nothing
from .stopwatch import Stopwatch, Underway
from .windowed import Journey, windowed

# torch 2.13 renamed these; the old names warn there.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Splits:
    """Rows that travel between this rank and each rank of the axis."""

    send: list[int]
    receive: list[int]
    pieces: int = 1
    """Calls the exchange is cut into: the same number on all ranks."""

    def reversed(self) -> Splits:
        return Splits(self.receive, self.send, self.pieces)


class _Flight:
    """One exchange on its way: launch now, `land` later."""

    def __init__(self, rows: Tensor, splits: Splits, axis: Axis, name: str, recorder: Recorder) -> None:
        self.name, self.recorder, self.splits = name, recorder, splits
        away = sum(n for rank, n in enumerate(splits.send) if rank != axis.rank)
        recorder.collective_entered(name, away * rows.size(-1) * rows.element_size())
        self.received = rows.new_empty((sum(splits.receive), rows.size(-1)))
        self.pieces = [self._launch(rows.contiguous(), i, axis) for i in range(splits.pieces)]
        self.underway = Underway((work for work, *_ in self.pieces), rows.device)

    def _launch(self, rows: Tensor, piece: int, axis: Axis) -> tuple[dist.Work | None, Tensor, Tensor, list[int]]:
        """Starts piece number `piece`; both buffers must live until it is done."""
        splits = self.splits
        send, receive = splits.send, splits.receive
        sent, received = rows, self.received
        if splits.pieces > 1:
            parts = _cut(rows.split(send), piece, splits.pieces)
            sent, send = torch.cat(parts), [part.size(0) for part in parts]
            receive = [part.size(0) for part in _cut(received.split(receive), piece, splits.pieces)]
            received = rows.new_empty((sum(receive), rows.size(-1)))
        work = dist.all_to_all_single(received, sent, receive, send, group=axis.group, async_op=True)
        return work, sent, received, receive

    def arrived(self) -> bool:
        """Whether everything has."""
        return all(work is None or work.is_completed() for work, *_ in self.pieces)

    def land(self, during: During = nothing) -> Tensor:
        """Waits until everything has arrived, and does `during` before."""
        during(self.arrived)
        hidden, watch = self.underway.hidden(), Stopwatch(self.received.device)
        with named(f"wait {self.name}"):
            for i, (work, _, received, receive) in enumerate(self.pieces):
                if work is not None:
                    work.wait()
                if self.splits.pieces > 1:
                    into = _cut(self.received.split(self.splits.receive), i, self.splits.pieces)
                    for part, arrived in zip(into, received.split(receive), strict=True):
                        part.copy_(arrived)
        self.recorder.collective_left(self.name, watch.stop(), hidden)
        self.pieces.clear()
        return self.received


def _cut(parts: Sequence[Tensor], piece: int, pieces: int) -> list[Tensor]:
    """Part number `piece` of `pieces` of every tensor's rows: views, equal on sender and receiver."""
    return [t[t.size(0) * piece // pieces : t.size(0) * (piece + 1) // pieces] for t in parts]


@dataclass
class _Journey:
    """What the two autograd nodes of one exchange share."""

    splits: Splits
    axis: Axis
    name: str
    recorder: Recorder
    during: tuple[During, During]
    """Before forward and backward wait."""
    out: _Flight | None = None
    back: _Flight | None = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, journey):
        ctx.journey = journey
        journey.out = _Flight(rows, journey.splits, journey.axis, journey.name, journey.recorder)
        # A handle for autograd only: the rows are not there yet, `_Wait` hands them out.
        return journey.out.received

    @staticmethod
    def backward(ctx, *grads):
        flight, ctx.journey.back = ctx.journey.back, None
        assert flight is not None, "the gradient's exchange was never started"
        return flight.land(ctx.journey.during[1]), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, in_flight, journey):
        ctx.journey = journey
        flight, journey.out = journey.out, None
        return flight.land(journey.during[0]).view_as(in_flight)

    @staticmethod
    def backward(ctx, *grads):
        journey = ctx.journey
        back = journey.splits.reversed()
        journey.back = _Flight(grads[0], back, journey.axis, journey.name + "-gradient", journey.recorder)
        return grads[0], None  # ignored by `_Start`, whose gradient is what arrives


@dataclass
class Exchange:
    """Rows on their way; `wait` returns them once."""

    rows: Tensor
    journey: _Journey | None

    def wait(self) -> Tensor:
        """The received rows [sum(receive), D], ordered by the rank they came from."""
        if self.journey is None:
            return self.rows
        return _Wait.apply(self.rows, self.journey)  # pyright: ignore[reportReturnType]


def start_all_to_all(
    rows: Tensor,
    splits: Splits,
    axis: Axis,
    name: str,
    recorder: Recorder,
    during: tuple[During, During] = (nothing, nothing),
) -> Exchange:
    """Starts sending consecutive runs of `rows` [N, D] (splits.send per rank) over `axis`.

    On an axis of one rank the rows stay where they are. `name` tells the recorder what travels; `during` is done before
    forward and backward wait for it.
    """
    if axis.group is None:
        return Exchange(rows, None)
    journey = _Journey(splits, axis, name, recorder, during)
    started: Tensor = _Start.apply(rows, journey)  # pyright: ignore[reportAssignmentType]
    return Exchange(started, journey)


def scatter(
    whole: Tensor,
    dim: int,
    axis: Axis,
    name: str,
    recorder: Recorder,
    during: tuple[During, During] = (nothing, nothing),
) -> Tensor:
    """This rank's part along `dim` of the sum of `whole` over `axis` (reduce-scatter); gradients are gathered.

    `during` is done before forward and backward wait.
    """

    def parts(grad: Tensor) -> Journey:
        return start_gather(grad, dim, axis, f"{name}-gradient", recorder)

    return windowed(whole, lambda whole: start_scatter(whole, dim, axis, name, recorder), parts, during)


def sum_over(term: Tensor, axis: Axis, name: str, recorder: Recorder) -> Tensor:
    """Sum of every rank's `term`; each rank goes on with it in its own way, so gradients are summed too."""

    def total(term: Tensor, name: str) -> Journey:
        return Journey(None, all_reduce(term.clone(), axis, name, recorder))

    return windowed(term, partial(total, name=name), partial(total, name=f"{name}-gradient"))


def start_gather(part: Tensor, dim: int, axis: Axis, name: str, recorder: Recorder) -> Journey:
    """Starts to bring the parts of all ranks of `axis`, of one shape, side by side along `dim`. Not differentiable."""
    recorder.collective_entered(name, part.numel() * part.element_size() * (axis.size - 1))
    sent, parts = part.contiguous(), part.new_empty((axis.size, *part.shape))
    work = all_gather_single(parts.view(-1), sent.view(-1), group=axis.group, async_op=True)
    return Journey(work, parts, sent, lambda parts: parts.movedim(0, dim).flatten(dim, dim + 1), name, recorder)


def start_scatter(whole: Tensor, dim: int, axis: Axis, name: str, recorder: Recorder) -> Journey:
    """Starts to sum `whole` over `axis`, for this rank's part of it along `dim`. Not differentiable."""
    recorder.collective_entered(name, whole.numel() * whole.element_size() * (axis.size - 1) // axis.size)
    sent = whole.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()
    if whole.device.type != "cpu":
        part = torch.empty_like(sent[0])
        work = reduce_scatter_single(part.view(-1), sent.view(-1), group=axis.group, async_op=True)
        return Journey(work, part, sent, name=name, recorder=recorder)
    # gloo's reduce-scatter is an all-reduce: this takes less than half its time, and adds in order of rank.
    terms = torch.empty_like(sent)
    work = dist.all_to_all_single(terms, sent, group=axis.group, async_op=True)
    return Journey(work, terms, sent, lambda terms: terms.sum(0), name, recorder)


def all_gather_rows(row: Tensor, axis: Axis, name: str, recorder: Recorder) -> Tensor:
    """Every rank's `row` [n], stacked to [axis.size, n]. Not differentiable."""
    if axis.group is None:
        return row.unsqueeze(0)
    out = row.new_empty((axis.size, *row.shape))
    recorder.collective_entered(name, row.numel() * row.element_size() * (axis.size - 1))
    watch = Stopwatch(row.device)
    all_gather_single(out.view(-1), row.contiguous().view(-1), group=axis.group)
    recorder.collective_left(name, watch.stop())
    return out


def all_reduce(tensor: Tensor, axis: Axis, name: str, recorder: Recorder, op=dist.ReduceOp.SUM) -> Tensor:
    """Sums (or `op`) `tensor` over the axis in place and returns it. Not differentiable."""
    if axis.group is not None:
        recorder.collective_entered(name, tensor.numel() * tensor.element_size())
        watch = Stopwatch(tensor.device)
        dist.all_reduce(tensor, op=op, group=axis.group)
        recorder.collective_left(name, watch.stop())
    return tensor


def gather_to_root(value: Any, axis: Axis, name: str, recorder: Recorder) -> list[Any] | None:
    """On rank 0 of `axis` everyone's `value` (a small picklable object), in order of rank; None on the others."""
    if axis.group is None:
        return [value]
    recorder.collective_entered(name, 0)
    start = time.perf_counter()
    values: list[Any] | None = [None] * axis.size if axis.rank == 0 else None
    dist.gather_object(value, values, dst=dist.get_global_rank(axis.group, 0), group=axis.group)
    recorder.collective_left(name, time.perf_counter() - start)
    return values


def share_from_root(value: Any, axis: Axis, name: str, recorder: Recorder) -> Any:
    """The `value` (a small picklable object) of rank 0 of `axis`, on all of its ranks."""
    if axis.group is None:
        return value
    recorder.collective_entered(name, 0)
    start = time.perf_counter()
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(axis.group, 0), group=axis.group)
    recorder.collective_left(name, time.perf_counter() - start)
    return values[0]


def tune_pieces(mesh: Mesh, probe_bytes: int = 2**20, rounds: int = 5) -> int:
    """Largest message in bytes that is best sent uncut over the expert axis; 0 if cutting never pays.

    Measured: an exchange of `probe_bytes` per rank pair, whole and cut. A full-duplex link behind a half-duplex
    backend (gloo) gains up to twice by cutting, a long link loses. All ranks return rank 0's finding.
    """
    axis = mesh.expert
    if axis.group is None or mesh.device.type != "cpu":
        return 0  # NCCL pipelines its messages itself
    width = 256
    rows = probe_bytes // (4 * width)
    data = torch.zeros(rows * axis.size, width)
    best, best_s = 0, float("inf")
    for piece_bytes in (0, 512 * 1024, 256 * 1024):
        pieces = max(1, probe_bytes // piece_bytes) if piece_bytes else 1
        splits = Splits([rows] * axis.size, [rows] * axis.size, pieces)
        times = []
        for _ in range(rounds):
            dist.barrier(group=axis.group)
            start = time.perf_counter()
            _Flight(data, splits, axis, "link-probe", mesh.recorder).land()
            times.append(time.perf_counter() - start)
        # Cutting must win clearly: on a fast link the difference is noise.
        if min(times) < 0.75 * best_s:
            best, best_s = piece_bytes, min(times)
    found = torch.tensor([best])
    dist.broadcast(found, group=mesh.world.group, src=0)
    return int(found)
