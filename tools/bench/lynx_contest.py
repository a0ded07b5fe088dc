"""What each rank does in the `lynx` benchmark: one model for each way to recompute, taking turns step by step.

timed      all policies over one link, at some budgets: seconds, memory, and what was hidden
compared   the gradients of all policies in a training, bit by bit
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...launch.config import TrainConfig
from ...launch.errors import UserError
from ...launch.optimizer import make_optimizer
from ...launch.peak_memory import held_bytes, peak_bytes
from ...launch.precision import compute_dtype, weight_dtype
from ...launch.recompute_planner import Measurement, Plan, Planner
from ...launch.step import Stepper
from ...moe.decoder import build_decoder
from ...moe.ledger import Ledger
from ...parallel.collectives import share_from_root, tune_pieces
from ...parallel.config import ParallelConfig, RecomputeConfig
from ...parallel.gradients import Gradients
from ...parallel.lynx.evaluate import evaluate
from ...parallel.lynx.extremes import all_kept, all_on_demand
from ...parallel.mesh import Mesh
from ...parallel.meter import Meter
from ...parallel.recomputation import KEEP, Schedule
from ...parallel.tensor import local
from ..random_tokens import RandomTokens
from .interleave import interleave
from .lynx_selective import keep_products
from .lynx_trace import trace_of
from .rectify_methods import DisagreementError

MODES = ("none", "full", "selective", "lynx")
"""Models. `selective` is torch's selective checkpointing, not `recompute.mode: selective`."""
SOLVERS = {"lynx-heu": "heu-mix", "lynx-opt": "opt"}
"""Policies that are planned for a budget."""
POLICIES = ("none", "full", "full, kept", "selective", *SOLVERS)
"""full: blocks, with what they send (Megatron-LM); full, kept: what collectives brought is kept, all else dropped."""
SEARCH_S = 10.0
"""For OPT; it has mostly proven its answer before."""
MEASURED_STEPS = 5
WARM_UP = 2
AMPLE = 2**50
"""Bytes, where a budget is not the question."""
PROFILED_STEP = 1_000
"""Number of the step in which memory is counted, the same tokens for all."""


@dataclass(frozen=True)
class Contest:
    """What the ranks of one launch are told."""

    base: TrainConfig
    """Of one rank: `train.batch` sequences are its share."""
    parts: tuple[float, ...]
    """Budgets: parts of the activations between the least, where everything is dropped, and what `none` has; and one
    more, what `selective` takes."""
    rounds: int


class Side:
    """One model on this rank, and what trains it."""

    def __init__(self, base: TrainConfig, mode: str, mesh: Mesh, piece_bytes: int) -> None:
        world = mesh.world.size
        known = "none" if mode == "selective" else mode
        self.config = replace(
            base,
            parallel=replace(base.parallel, expert=world),
            recompute=RecomputeConfig(mode=known, budget=AMPLE),  # pyright: ignore[reportArgumentType]
            train=replace(base.train, batch=base.train.batch * world),
        )
        self.ledger = Ledger()
        self.mesh = replace(mesh, recorder=self.ledger)
        precision = base.train.precision
        self.model = build_decoder(
            self.config.model,
            self.config.router,
            self.mesh,
            seed=base.train.seed,
            dtype=weight_dtype(precision),
            piece_bytes=piece_bytes,
            compute_dtype=compute_dtype(precision),
            recompute=self.config.recompute,
        )
        if mode == "selective":
            keep_products(self.model)
        gradients = Gradients(self.model, self.mesh, self.config.parallel.bucket_bytes)
        samples: Any = RandomTokens(self.config.model.vocab_size, self.config.data.seq_len)
        optimizer = make_optimizer(self.model, self.config.optimizer)
        self.stepper = Stepper(self.config, self.mesh, self.model, optimizer, gradients, samples)

    def step(self, number: int, schedule: Schedule = KEEP) -> float:
        """One training step under `schedule`; its seconds. Raises DisagreementError where it was not finite."""
        self.model.recomputation.schedule = schedule
        begin = time.perf_counter()
        result = self.stepper.step(number, number * self.config.train.batch, stop=False)
        seconds = time.perf_counter() - begin
        if not result.applied:
            raise DisagreementError(f"step {number} was not finite")
        return seconds

    def gradients(self) -> dict[str, Tensor]:
        """Those of the last step, clipped."""
        named = self.model.named_parameters()
        return {name: local(each.grad) for name, each in named if each.grad is not None}


@dataclass(frozen=True)
class Cost:
    """One step on this rank, in seconds."""

    hidden: float
    """Recomputation begun under communication ..."""
    exposed: float
    """... and not; of what torch checkpoints nothing is known."""
    waited: float
    """Stood still for collectives."""


class Contender:
    """A model under one schedule, and its account."""

    def __init__(self, side: Side, schedule: Schedule = KEEP) -> None:
        self.side, self.schedule = side, schedule
        self.costs: list[Cost] = []
        self.steps = 0

    def run(self) -> float:
        """The next step; the seconds of the slowest rank, the same on all of them."""
        self.side.ledger.clear()
        self.side.model.recomputation.spent.take()
        slowest = torch.tensor(self.side.step(self.steps, self.schedule), dtype=torch.float64)
        self.steps += 1
        page = self.side.ledger.page()
        # Nobody starts the next step before all have ended this one.
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        hidden, exposed = self.side.model.recomputation.spent.take()
        self.costs.append(Cost(hidden, exposed, page.waited_s))
        return slowest.item()

    def peak_bytes(self) -> int:
        """Most that a rank has at once in a step: weights, gradients, optimizer state and activations."""
        side = self.side
        held = held_bytes(side.model, side.stepper.optimizer)
        most = torch.tensor(held + peak_bytes(lambda: side.step(PROFILED_STEP, self.schedule)))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def cost(self, rounds: int) -> Cost:
        """Medians of the last `rounds` steps, means over the ranks."""
        last = [asdict(cost) for cost in self.costs[-rounds:]]
        mine = torch.tensor([statistics.median(each[name] for each in last) for name in last[0]], dtype=torch.float64)
        dist.all_reduce(mine)
        return Cost(*(mine / dist.get_world_size()).tolist())


def timed(contest: Contest, mesh: Mesh) -> dict[str, Any]:
    """Rows of all policies at all budgets, what was measured before they were planned, and a trace of a step.

    The same on all ranks.
    """
    pieces = tune_pieces(mesh)
    sides = {mode: Side(contest.base, mode, mesh, pieces) for mode in MODES}
    for side in sides.values():
        # The optimizer makes its state.
        side.step(0)
    planner = Planner(sides["lynx"].config, sides["lynx"].mesh, sides["lynx"].model)
    planner.time_limit = SEARCH_S
    measurement = measured(sides["lynx"], planner)
    everything = planner.everything_dropped()
    fixed = {mode: Contender(sides[mode]) for mode in MODES[:3]} | {"full, kept": Contender(sides["lynx"], everything)}
    peaks = {name: each.peak_bytes() for name, each in fixed.items()}
    least, most = peaks["full, kept"], peaks["none"]
    budgets = {f"{100 * part:.0f} %": int(least + part * (most - least)) for part in contest.parts}
    budgets["selective's"] = peaks["selective"]
    plans = {
        (policy, budget): plan
        for budget, (policy, solver) in itertools.product(budgets, SOLVERS.items())
        if (plan := planned(planner, measurement, solver, budgets[budget])) is not None
    }
    # What is the same schedule takes one turn.
    turns = {_key(each.schedule): name for name, each in fixed.items() if name == "full, kept"}
    contenders = dict(fixed)
    turn_of: dict[tuple[str, str | None], str] = {(name, None): name for name in fixed}
    for (policy, budget), plan in plans.items():
        name = turns.setdefault(_key(plan.schedule), f"{policy} {budget}")
        turn_of[policy, budget] = name
        if name not in contenders:
            contenders[name] = Contender(sides["lynx"], plan.schedule)
            peaks[name] = contenders[name].peak_bytes()
    timings = interleave({n: each.run for n, each in contenders.items()}, rounds=contest.rounds, warmup=WARM_UP)
    costs = {name: each.cost(contest.rounds) for name, each in contenders.items()}
    expected = {"full, kept": measurement.step_seconds, **predicted(planner, measurement, contest.base.model.layers)}

    def row(policy: str, budget: str | None) -> dict[str, Any]:
        name = turn_of[policy, budget]
        plan = plans.get((policy, budget or ""))
        seconds = timings.seconds[name]
        return {
            "policy": policy,
            "budget": budget,
            "budget_bytes": None if budget is None else budgets[budget],
            "peak_bytes": peaks[name],
            "planned_peak_bytes": None if plan is None else plan.peak_bytes,
            "step_seconds": timings.median(name),
            "quartiles": statistics.quantiles(seconds, n=4, method="inclusive")[::2],
            "predicted_seconds": expected.get(policy) if plan is None else plan.step_seconds,
            "planned_hidden_seconds": None if plan is None else plan.hidden_seconds,
            "dropped": len(contenders[name].schedule.dropped),
            **{f"{what}_seconds": value for what, value in asdict(costs[name]).items()},
            "turn": name,
        }

    shown = plans.get(("lynx-heu", next(iter(budgets))))
    return {
        "rows": [row(*each) for each in turn_of],
        "seconds": timings.seconds,
        "budgets": budgets,
        "piece_bytes": pieces,
        "windows": windows_of(measurement, contest.base.model.layers),
        "trace": None if shown is None else trace_of(lambda: sides["lynx"].step(PROFILED_STEP, shown.schedule)),
    }


def measured(side: Side, planner: Planner) -> Measurement:
    """Some steps in which everything is computed again on demand."""
    recomputation, everything = side.model.recomputation, planner.everything_dropped()
    side.step(0, everything)
    recomputation.spent.take()
    recomputation.meter = Meter(side.mesh.device)
    seconds = [side.step(number, everything) for number in range(MEASURED_STEPS)]
    found = planner.measured(recomputation.meter, seconds, sum(recomputation.spent.take()))
    recomputation.meter = None
    return found


def planned(planner: Planner, measurement: Measurement, solver: str, budget: int) -> Plan | None:
    """Rank 0's plan, on all ranks: a search that is ended by a clock ends elsewhere on each; None: nothing fits."""
    found: Plan | None = None
    if planner.mesh.world.rank == 0:
        with contextlib.suppress(UserError):
            found = planner.plan(measurement, solver=solver, budget=budget)
    return share_from_root(found, planner.mesh.world, "recompute-plan", planner.mesh.recorder)


def predicted(planner: Planner, measurement: Measurement, layers: int) -> dict[str, float]:
    """Seconds of a step without a budget, from the same measurement."""
    windows = windows_of(measurement, layers)
    return {
        "none": planner.plan(measurement, solver="none", budget=AMPLE).step_seconds,
        # It waits once more for all that forward waited for.
        "full": measurement.step_seconds + windows["forward"],
    }


def windows_of(measurement: Measurement, layers: int) -> dict[str, float]:
    """Seconds that a step's collectives of `layers` layers of one kind last beyond what runs under them anyway."""
    [kind] = measurement.kinds.values()
    backward = sum(seconds for name, seconds in kind.windows.items() if name.endswith("gradient"))
    return {"forward": layers * (sum(kind.windows.values()) - backward), "backward": layers * backward}


def compared(base: TrainConfig, steps: int, mesh: Mesh) -> dict[str, Any]:
    """Trains one model under each policy and compares all gradients of every step with those of `none`.

    Raises DisagreementError where a bit differs.
    """
    sides = {policy: Side(base, "lynx" if policy not in MODES else policy, mesh, 0) for policy in POLICIES}
    # Planned on a model that no one compares: what is measured is trained too.
    side = Side(base, "lynx", mesh, 0)
    planner = Planner(side.config, side.mesh, side.model)
    planner.time_limit = SEARCH_S
    measurement = measured(side, planner)
    schedules = dict.fromkeys(POLICIES, KEEP) | {"full, kept": planner.everything_dropped()}
    [(stage, _)] = planner.measured_stages(measurement, AMPLE)
    least, most = (evaluate(stage, each(stage)).peak for each in (all_on_demand, all_kept))
    for policy, solver in SOLVERS.items():
        plan = planned(planner, measurement, solver, least + (most - least) // 4)
        if plan is not None:
            schedules[policy] = plan.schedule
    tensors = 0
    for step in range(steps):
        for policy, each in sides.items():
            each.step(step, schedules[policy])
        expected = sides["none"].gradients()
        tensors += len(expected)
        for policy, each in sides.items():
            for name, gradient in each.gradients().items():
                if not gradient.equal(expected[name]):
                    raise DisagreementError(f"{policy}: the gradient of {name} differs from that of none, step {step}")
    dropped = {policy: len(schedules[policy].dropped) for policy in SOLVERS}
    return {"steps": steps, "tensors": tensors, "dropped": dropped}


def _key(schedule: Schedule) -> tuple[Any, ...]:
    windows: Mapping[str, tuple[str, ...]] = schedule.windows
    return tuple(sorted(schedule.dropped)), tuple(sorted(windows.items()))


def layout(world: int) -> ParallelConfig:
    """Ranks that share the experts."""
    return ParallelConfig(expert=world, timeout_seconds=120)
