"""Collectives with known results and training with known numbers, on real ranks: `wastenot doctor --selftest`.

As a program (`-m wastenot.tools.selftest FILE`) it is one rank: rank 0 writes the findings to FILE as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ..launch import env
from ..launch.local import run_ranks
from ..launch.watchdog import Watchdog
from ..parallel.config import ParallelConfig

TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check, over all ranks."""

    name: str
    good: bool
    detail: str
    """Milliseconds, or how near the numbers are, where it is good; else what went wrong where."""


def all_reduce(rank: int, world: int, device: torch.device) -> bool:
    """Every rank gets the sum."""
    values = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(values)
    return bool((values == world * (world + 1) / 2).all())


def all_to_all(rank: int, world: int, device: torch.device) -> bool:
    """Uneven splits, empty ones among them: rank r sends (r + to) % 3 rows that say who sent them."""
    sends = [(rank + peer) % 3 for peer in range(world)]
    # How much travels between two ranks is the same in both directions.
    rows = torch.full((sum(sends), 4), float(rank), device=device)
    received = torch.full_like(rows, -1.0)
    dist.all_to_all_single(received, rows, sends, sends)
    expected = torch.repeat_interleave(torch.arange(world), torch.tensor(sends)).to(device, rows.dtype)
    return bool((received == expected[:, None]).all())


def all_gather(rank: int, world: int, device: torch.device) -> bool:
    """Every rank gets what each has, in bf16."""
    parts = [torch.empty(3, dtype=torch.bfloat16, device=device) for _ in range(world)]
    dist.all_gather(parts, torch.full((3,), float(rank), dtype=torch.bfloat16, device=device))
    return all(bool((part == source).all()) for source, part in enumerate(parts))


CHECKS: tuple[Callable[[int, int, torch.device], bool], ...] = (all_reduce, all_to_all, all_gather)


def check(device: torch.device, watchdog: Watchdog) -> list[Finding]:
    """Runs every check on the initialised process group; all ranks call it and get the same findings."""
    return [*_check_collectives(device, watchdog), *_check_training(device, watchdog)]


def _check_collectives(device: torch.device, watchdog: Watchdog) -> list[Finding]:
    mine = []
    rank, world = dist.get_rank(), dist.get_world_size()
    for check in CHECKS:
        watchdog.collective_entered(check.__name__, 0)
        good = check(rank, world, device)
        start = time.perf_counter()
        good = check(rank, world, device) and good
        took_ms = (time.perf_counter() - start) * 1e3
        watchdog.collective_left(check.__name__, took_ms / 1e3)
        mine.append((good, took_ms))
    everyone: list[list[tuple[bool, float]]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, mine)
    findings = []
    for check, by_rank in zip(CHECKS, zip(*everyone, strict=True), strict=True):
        wrong = [number for number, (good, _) in enumerate(by_rank) if not good]
        slowest_ms = max(took_ms for _, took_ms in by_rank)
        detail = f"wrong results on ranks {wrong}" if wrong else f"{slowest_ms:.1f} ms on {world} ranks"
        findings.append(Finding(name=check.__name__, good=not wrong, detail=detail))
    return findings


def _check_training(device: torch.device, watchdog: Watchdog) -> list[Finding]:
    # Imported here: a model takes a second that `doctor` alone need not spend.
    from . import selftest_parity as parity

    findings = []
    world = dist.get_world_size()
    for layout in parity.layouts(world):
        everyone: list[float] = [0.0] * world
        dist.all_gather_object(everyone, parity.largest_difference(layout, world, device, watchdog))
        # As it reads, so that no number at all is no success.
        wrong = [rank for rank, difference in enumerate(everyone) if not difference <= parity.BOUND]
        shown = f"losses and gradients as in one process, to {max(everyone):.0e}"
        if wrong:
            shown = f"losses and gradients differ from those of one process by {everyone[wrong[0]]:.0e}; ranks {wrong}"
        findings.append(Finding(name=parity.name_of(layout), good=not wrong, detail=shown))
    return findings


def on_local_ranks(nproc: int = 2) -> list[Finding]:
    """Starts `nproc` gloo ranks on this host and returns what they find."""
    with tempfile.TemporaryDirectory(prefix="wastenot-selftest-") as folder:
        file = Path(folder) / "findings.json"
        code = run_ranks([str(file)], nproc, module="wastenot.tools.selftest")
        if code == 0 and file.exists():
            return [Finding(**finding) for finding in json.loads(file.read_text())]
    detail = f"the ranks ended with exit code {code}; what they said stands above"
    return [Finding(name="local ranks", good=False, detail=detail)]


def main(file: str) -> int:
    """One rank."""
    rank, device = env.detect(os.environ), torch.device("cpu")
    store = env.start(rank, ParallelConfig(backend="gloo", timeout_seconds=TIMEOUT_SECONDS), device)
    watchdog = Watchdog(rank, store, TIMEOUT_SECONDS)
    findings = check(device, watchdog)
    if rank.rank == 0:
        Path(file).write_text(json.dumps([asdict(finding) for finding in findings]))
    watchdog.close()
    env.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
