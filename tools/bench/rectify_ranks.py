"""What each rank does in the `rectify-speed` benchmark: all methods alive side by side, taking turns step by step.

`python -m wastenot.tools.bench.rectify_ranks CONTEST RESULT` is one rank, as `rectify_speed.launch` starts it.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...launch.config import TrainConfig
from ...launch.data import Samples
from ...launch.env import detect, start, stop
from ...launch.memory import keep_freed_memory
from ...launch.optimizer import make_optimizer
from ...launch.run_folder import write_atomically
from ...launch.shards import TokenShards
from ...launch.step import Stepper, StepResult
from ...moe.decoder import build_decoder
from ...moe.ledger import SLOTS, Ledger
from ...moe.routing import Routing
from ...parallel.collectives import tune_pieces
from ...parallel.config import ParallelConfig
from ...parallel.gradients import Gradients
from ...parallel.mesh import Mesh, make_mesh, single
from .interleave import interleave
from .link import bytes_sent
from .memory import saved_for_backward
from .rectify_account import ledger_seconds, make_row, peak_resident_bytes, rows_computed
from .rectify_contest import Case, Contest, check_bytes, configure
from .rectify_methods import METHODS, DisagreementError, Method, check_first_step

EXCHANGES = ("dispatch", "combine", "dispatch-gradient", "combine-gradient")
"""Collectives that carry tokens or their gradients."""

FirstStep = tuple[float, float]
"""Loss and gradient norm."""


@dataclass(frozen=True)
class StepCost:
    """What one step took on this rank."""

    processor_s: float
    waited_s: float
    """Stood still for dispatch and combine, forward and backward."""
    calls: int
    """Collectives."""
    sent_bytes: int
    """As the ledger counts them."""
    kernel_bytes: int | None
    """As the kernel counts them, with headers and acknowledgements; None on loopback, which all ranks share."""


class Contender:
    """One method's model on this rank, its training and its account."""

    def __init__(self, contest: Contest, case: Case, method: Method, mesh: Mesh, piece_bytes: int) -> None:
        self.ledger = Ledger()
        self.mesh = replace(mesh, recorder=self.ledger)
        config = configure(contest, case, method, mesh.world.size)
        self.stepper = _make_stepper(contest, config, self.mesh, piece_bytes)
        self.costs: list[StepCost] = []
        self.steps = 0

    def first_step(self) -> tuple[StepResult, int]:
        """The first step with every routing checked, and the bytes that its forward pass saved for backward."""
        config = self.stepper.config
        self.stepper.config = replace(config, log=replace(config.log, debug=True))
        with saved_for_backward(self.stepper.model) as saved:
            result = self._step()
        self.stepper.config = config
        self.ledger.clear()
        return result, sum(saved.values())

    def run(self) -> float:
        """One step; the seconds of the slowest rank, the same on all of them."""
        sent, processor, begin = _kernel_bytes(), time.process_time(), time.perf_counter()
        self._step()
        seconds, processor = time.perf_counter() - begin, time.process_time() - processor
        slowest = torch.tensor(seconds, dtype=torch.float64)
        # Nobody starts the next step before all have ended this one.
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        page, now = self.ledger.page(), _kernel_bytes()
        self.ledger.clear()
        calls = sum(total.calls for total in page.collectives.values())
        waited_s = sum(page.collectives[kind].waited_s for kind in EXCHANGES)
        kernel_bytes = now - sent if now is not None and sent is not None else None
        self.costs.append(StepCost(processor, waited_s, calls, page.sent_bytes, kernel_bytes))
        return slowest.item()

    def account(self, first: StepResult, saved_bytes: int, rounds: int) -> dict[str, Any]:
        """What this rank knows of the last `rounds` steps, as plain numbers. All ranks call it."""
        config, costs, routings = self.stepper.config, self.costs[-rounds:], self._routings()
        assert config.model.moe is not None
        kernel_bytes = [cost.kernel_bytes for cost in costs if cost.kernel_bytes is not None]
        return {
            "sent_bytes": [cost.sent_bytes for cost in costs],
            "kernel_bytes": statistics.median(kernel_bytes) if kernel_bytes else None,
            "waited_s": statistics.median(cost.waited_s for cost in costs),
            "processor_s": statistics.median(cost.processor_s for cost in costs),
            "slots": first.local_counts[:, -len(SLOTS) :].tolist(),
            "expert_rows": rows_computed(routings, config.model.moe.dispatch == "padded", self.mesh).tolist(),
            "saved_bytes": saved_bytes,
            "peak_resident_bytes": peak_resident_bytes(),
            "ledger_s": ledger_seconds(routings, first.counts, costs[-1].calls, config.log.every, self.mesh),
        }

    def _step(self) -> StepResult:
        result = self.stepper.step(self.steps, self.steps * self.stepper.config.train.batch, stop=False)
        self.steps += 1
        if not result.applied:
            raise DisagreementError(f"step {self.steps} was not finite")
        return result

    def _routings(self) -> list[Routing]:
        """Those of one more forward pass."""
        share = self.stepper.config.train.batch // self.mesh.world.size
        windows = torch.from_numpy(self.stepper.samples.take(self.mesh.world.rank * share, share))
        with torch.no_grad():
            return self.stepper.model(windows[:, :-1]).routings


def run_case(
    contest: Contest, case: Case, mesh: Mesh, piece_bytes: int, expected: Mapping[str, FirstStep]
) -> list[dict[str, Any]]:
    """Rows of all methods at `case`, the same on all ranks; `expected` is what one process said of the first step.

    Raises DisagreementError where a method computes something else, or sends what it must not.
    """
    contenders = {method: Contender(contest, case, method, mesh, piece_bytes) for method in METHODS}
    first = {method: contender.first_step() for method, contender in contenders.items()}
    for method, (result, _) in first.items():
        check_first_step(f"{case}, {method}", (result.loss, result.grad_norm), expected[method])
    # Every rank draws the same order and hears the same seconds, so all stop after the same round.
    timings = interleave(
        {method: contender.run for method, contender in contenders.items()},
        rounds=contest.rounds,
        warmup=contest.warmup,
        budget_s=contest.budget_s,
    )
    rounds = len(timings.seconds["vanilla"])
    mine = {method: contender.account(*first[method], rounds) for method, contender in contenders.items()}
    by_rank = _gathered(mine, mesh)
    check_bytes(case, {method: [accounts[method]["sent_bytes"] for accounts in by_rank] for method in METHODS})
    return [
        make_row(case, method, first[method][0], [accounts[method] for accounts in by_rank], timings)
        for method in METHODS
    ]


def emulate(contest: Contest, mesh: Mesh) -> dict[tuple[str, int], dict[str, FirstStep]]:
    """First steps in one process that stands for all ranks, by router and top_k; the ranks share the work.

    How rows travel does not matter there.
    """
    cases = {(case.router, case.top_k): case for case in contest.cases}
    jobs = list(itertools.product(cases, METHODS))
    mine: dict[tuple[tuple[str, int], str], FirstStep] = {}
    for key, method in jobs[mesh.world.rank :: mesh.world.size]:
        config = configure(contest, cases[key], method, mesh.world.size, emulated=True)
        result = _make_stepper(contest, config, single()).step(0, 0, stop=False)
        mine[key, method] = (result.loss, result.grad_norm)
    found = {job: first for part in _gathered(mine, mesh) for job, first in part.items()}
    return {key: {method: found[key, method] for method in METHODS} for key in cases}


def _make_stepper(contest: Contest, config: TrainConfig, mesh: Mesh, piece_bytes: int = 0) -> Stepper:
    """A fresh model and what trains it: the same weights and data under every method and layout."""
    model = build_decoder(config.model, config.router, mesh, seed=config.train.seed, piece_bytes=piece_bytes)
    gradients = Gradients(model, mesh, config.parallel.bucket_bytes)
    samples = Samples(TokenShards.open(contest.corpus, "train"), config.data.seq_len, config.train.seed)
    return Stepper(config, mesh, model, make_optimizer(model, config.optimizer), gradients, samples)


def _gathered(value: Any, mesh: Mesh) -> list[Any]:
    """Everyone's `value`, on all ranks."""
    values: list[Any] = [None] * mesh.world.size
    dist.all_gather_object(values, value)
    return values


def _kernel_bytes() -> int | None:
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return None if interface == "lo" else bytes_sent(interface)


def main(argv: Sequence[str]) -> None:
    """One rank from start to end; rank 0 writes the rows and speaks on stderr."""
    contest: Contest = pickle.loads(Path(argv[0]).read_bytes())
    device = torch.device("cpu")
    keep_freed_memory()
    rank = detect(os.environ)
    start(rank, contest.base.parallel, device)
    # Ranks on hosts of their own cannot see that they share this machine's cores.
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    mesh = make_mesh(ParallelConfig(expert=rank.world), device)
    piece_bytes = tune_pieces(mesh)
    expected = emulate(contest, mesh)
    rows: list[dict[str, Any]] = []
    for case in contest.cases:
        found = run_case(contest, case, mesh, piece_bytes, expected[case.router, case.top_k])
        rows += found
        if rank.rank == 0:
            print(_summary(case, found), file=sys.stderr, flush=True)
    if rank.rank == 0:
        write_atomically(Path(argv[1]), json.dumps({"piece_bytes": piece_bytes, "rows": rows}))
    # Nobody closes a connection that another rank still reads from.
    dist.barrier()
    stop()


def _summary(case: Case, rows: Sequence[Mapping[str, Any]]) -> str:
    vanilla, *others = rows
    times = ", ".join(f"{row['method']} {row['vs_vanilla']:.3f}" for row in others)
    return (
        f"bench rectify-speed: {vanilla['world']} ranks, {case} (Gini {vanilla['gini']:.2f}): vanilla "
        f"{1e3 * vanilla['step_seconds']:.0f} ms; times that, over {vanilla['rounds']} rounds: {times}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
