"""Figures of links: collectives between ranks over several sizes, and how much compute goes on beside an exchange."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from ...parallel.collectives import Splits, all_gather_single, start_all_to_all
from ...parallel.events import Recorders
from ...parallel.lynx.cluster import Link
from ...parallel.lynx.traffic import all_reduce_bytes, all_to_all_bytes, reduce_scatter_bytes
from ...parallel.mesh import Axis
from ..bench.interleave import interleave
from .clock import Clock
from .fit import LinkFit, Sample, fit_link, speed_under

_WIDTH = 256
"""Numbers of a row that travels."""
_SILENT = Recorders()


@dataclass(frozen=True, kw_only=True)
class Level:
    """The ranks that talk through one link alone, this one among them."""

    link: Link
    axis: Axis


def levels(links: Sequence[Link], world: int, rank: int) -> list[Level]:
    """Of the links that so many ranks reach, from the inside out. Every rank calls it: groups are made."""
    found = []
    inner = 1
    for link in links:
        outer = min(link.devices, world)
        size = outer // inner
        if size < 2:
            break
        for first in (block + i for block in range(0, world, outer) for i in range(inner)):
            ranks = [first + inner * i for i in range(size) if first + inner * i < world]
            group = dist.new_group(ranks)
            if rank in ranks and len(ranks) > 1:
                assert isinstance(group, dist.ProcessGroup)
                found.append(Level(link=link, axis=Axis("link", len(ranks), ranks.index(rank), group)))
        inner = outer
    return found


def sizes(device: torch.device, *, quick: bool) -> tuple[int, ...]:
    """Bytes of what is exchanged."""
    if device.type == "cuda":
        return (2**12, 2**16, 2**20, 2**23, 2**26, *(() if quick else (2**28,)))
    return (2**12, 2**16, 2**18, 2**20, 2**22, *(() if quick else (2**24,)))


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of one size."""

    name: str
    sent: float
    """Bytes that one rank sends, as the cost model counts them."""
    run: Callable[[], object]


def steps(size: int) -> dict[str, int]:
    """Latencies that the cost model gives each collective of `size` ranks."""
    doublings = math.ceil(math.log2(size))
    return {"all-to-all": doublings, "all-reduce": 2 * doublings, "all-gather": doublings, "send and receive": 1}


def collectives(level: Level, size: int, device: torch.device, piece_bytes: int) -> list[Collective]:
    """Of `size` bytes, as near as rows allow; all-to-alls are cut as training cuts them."""
    axis, spans = level.axis, (level.axis.size,)
    rows = max(1, size // (4 * _WIDTH * axis.size))
    size = rows * 4 * _WIDTH * axis.size
    whole = torch.zeros(rows * axis.size, _WIDTH, device=device)
    part = torch.zeros(rows, _WIDTH, device=device)
    splits = _even(rows, axis.size, piece_bytes)
    found = [
        Collective(
            name="all-to-all",
            sent=all_to_all_bytes(spans, size)[0],
            run=lambda: start_all_to_all(whole, splits, axis, "profile", _SILENT).wait(),
        ),
        Collective(
            name="all-reduce",
            sent=all_reduce_bytes(spans, size)[0],
            run=lambda: dist.all_reduce(whole, group=axis.group),
        ),
        Collective(
            name="all-gather",
            sent=reduce_scatter_bytes(spans, size)[0],
            run=lambda: all_gather_single(whole.view(-1), part.view(-1), group=axis.group),
        ),
    ]
    if axis.size % 2 == 0:
        found.append(Collective(name="send and receive", sent=float(size), run=lambda: _there_and_back(whole, axis)))
    return found


def _even(rows: int, ranks: int, piece_bytes: int) -> Splits:
    pieces = max(1, -(-rows * _WIDTH * 4 // piece_bytes)) if piece_bytes else 1
    return Splits([rows] * ranks, [rows] * ranks, pieces)


def _there_and_back(message: torch.Tensor, axis: Axis) -> None:
    """Between neighbours: one way is half of it."""
    assert axis.group is not None
    peer = dist.get_global_rank(axis.group, axis.rank ^ 1)
    for is_mine in (axis.rank % 2 == 0, axis.rank % 2 == 1):
        if is_mine:
            dist.send(message, peer, group=axis.group)
        else:
            dist.recv(message, peer, group=axis.group)


def measure(
    level: Level, clock: Clock, message_sizes: Sequence[int], piece_bytes: int, rounds: int
) -> dict[str, list[Sample]]:
    """Bytes and seconds by collective, the same on every rank."""
    these = {
        (each.name, size): each
        for size in message_sizes
        for each in collectives(level, size, clock.device, piece_bytes)
    }
    works = {f"{name} {size}": each.run for (name, size), each in these.items()}
    seconds = together(works, level.axis, clock, rounds)
    found: dict[str, list[Sample]] = {}
    for (name, size), each in these.items():
        # Who comes last does not wait for others: what it waits is the exchange.
        taken = median(map(min, zip(*seconds[f"{name} {size}"], strict=True)))
        found.setdefault(name, []).append((each.sent, taken / 2 if name == "send and receive" else taken))
    return found


def together(
    works: Mapping[str, Callable[[], object]], axis: Axis, clock: Clock, rounds: int
) -> dict[str, list[list[float]]]:
    """Seconds by name, of every rank [ranks][rounds]: in turns that all ranks take in one order and start together."""

    def turn(name: str) -> Callable[[], float]:
        def work() -> float:
            dist.barrier(group=axis.group)
            return clock.seconds(works[name])

        return work

    mine = interleave({name: turn(name) for name in works}, rounds=rounds, warmup=2).seconds
    everyone: list[dict[str, list[float]]] = [{} for _ in range(axis.size)]
    dist.all_gather_object(everyone, dict(mine), group=axis.group)
    return {name: [each[name] for each in everyone] for name in works}


def speed_beside(level: Level, clock: Clock, fit: LinkFit, piece_bytes: int, rounds: int) -> float:
    """rho: an exchange alone, more compute than it lasts alone, and both at once; the same on every rank."""
    axis, device = level.axis, clock.device
    # Long enough that its start does not count.
    lasts = 2e-3 if device.type == "cuda" else 2e-2
    size = min(2**30, max(2**20, int(lasts * fit.bandwidth * fit.all_to_all * axis.size / (axis.size - 1))))
    rows = max(1, size // (4 * _WIDTH * axis.size))
    whole, splits = torch.zeros(rows * axis.size, _WIDTH, device=device), _even(rows, axis.size, piece_bytes)
    side = 4096 if device.type == "cuda" else 256
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def exchange() -> None:
        start_all_to_all(whole, splits, axis, "profile", _SILENT).wait()

    alone = median(map(max, zip(*together({"": exchange}, axis, clock, 3)[""], strict=True)))
    one = clock.seconds(lambda: torch.mm(left, right), 20)
    # All ranks must compute as long.
    told = torch.tensor([1.5 * alone / one], device=device)
    dist.all_reduce(told, group=axis.group, op=dist.ReduceOp.MAX)
    times = max(1, round(float(told)))

    def compute() -> None:
        for _ in range(times):
            torch.mm(left, right)

    def both() -> None:
        under_way = start_all_to_all(whole, splits, axis, "profile", _SILENT)
        compute()
        under_way.wait()

    works = {"exchange": exchange, "compute": compute, "both": both}
    seconds = together(works, axis, clock, rounds)
    slowest = {name: [max(each) for each in zip(*of_ranks, strict=True)] for name, of_ranks in seconds.items()}
    # Round by round, so that what disturbs one disturbs all.
    return median(
        speed_under(*each) for each in zip(slowest["exchange"], slowest["compute"], slowest["both"], strict=True)
    )


def fit(samples: Mapping[str, Sequence[Sample]], level: Level) -> LinkFit:
    """Figures of the link that `samples` were measured on."""
    return fit_link(samples, steps(level.axis.size))
