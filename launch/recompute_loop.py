"""`recompute.mode: lynx` in a run: measure, plan, run the plan, and look whether it still holds.

The first steps, and `recompute.measure_steps` after the routing has drifted, run with everything computed again on
demand. No loss depends on any of this, to the bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..moe.decoder import Decoder
from ..moe.ledger import SLOTS
from ..parallel.collectives import all_reduce, gather_to_root, share_from_root
from ..parallel.lynx.plain import digest
from ..parallel.mesh import Mesh
from ..parallel.meter import Meter
from ..parallel.recomputation import Recomputation
from .config import TrainConfig
from .errors import UserError
from .peak_memory import held_bytes, peak_bytes
from .recompute_planner import Measurement, Plan, Planner
from .settings import as_mapping

_WARM_UP = 1
"""Steps before those that are measured: they make the optimizer's state, and warm up what is measured."""


class RecomputeLoop:
    """Sets `model.recomputation` before each step. All ranks make the same calls."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None],
    ) -> None:
        """`say` tells the user of plans. Raises UserError where nothing is known of such a run."""
        self.config, self.mesh, self.model, self.optimizer, self.say = config, mesh, model, optimizer, say
        self.planner = Planner(config, mesh, model)
        model.recomputation.debug = config.log.debug
        if mesh.device.type == "cuda" and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
            say(
                "lynx: set CUDA_DEVICE_MAX_CONNECTIONS=1, so that an exchange surely starts before the recomputation "
                "that is launched after it"
            )
        self.plan: Plan | None = None
        self.peak_bytes: int | None = None
        """Measured, of this rank, in the first step of the plan."""
        self._planned_LE: Tensor | None = None
        """Choices that experts got while it was measured ..."""
        self._seen_LE: Tensor | None = None
        """... and since."""
        self._measure_again()

    def step(self, run: Callable[[], Tensor]) -> None:
        """Runs one step, `run`, which gives the choices of experts [L, E + slots] over all ranks, or of none."""
        if self.plan is None:
            self._measure(run)
            return
        self.recomputation.schedule = self.plan.schedule
        if self.peak_bytes is not None:
            self._see(run())
            return
        self.peak_bytes = self._peak(lambda: self._see(run()))
        self._keep_to_budget()

    @property
    def recomputation(self) -> Recomputation:
        """The model's."""
        return self.model.recomputation

    def numbers(self) -> dict[str, Any]:
        """For a line of metrics: what is expected of a step; nothing while it is measured. All ranks call it."""
        if self.plan is None:
            return {}
        names = ("step_seconds", "hidden_seconds", "exposed_seconds", "peak_bytes")
        expected = [float(getattr(self.plan, name)) for name in names]
        told = torch.tensor([*expected, self.peak_bytes or 0], dtype=torch.float64, device=self.mesh.device)
        all_reduce(told, self.mesh.world, "recompute-plan", self.mesh.recorder, torch.distributed.ReduceOp.MAX)
        *expected, peak = told.tolist()
        found: dict[str, Any] = {f"planned_{name}": value for name, value in zip(names, expected, strict=True)}
        return found | {"peak_bytes": int(peak), "budget_bytes": self.plan.budget_bytes}

    def look(self) -> None:
        """Plans anew where experts are chosen otherwise than when it was planned."""
        if self.plan is None or self._seen_LE is None or self._planned_LE is None:
            return
        moved = drift(self._planned_LE, self._seen_LE)
        self._seen_LE = None
        if moved > self.config.recompute.drift:
            self.say(f"lynx: {100 * moved:.0f} % of the choices of experts have moved since it was planned: again")
            self._measure_again()

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint, on the root: the plan in force. All ranks call it together."""
        own = None
        if self.plan is not None:
            choices = None if self._planned_LE is None else self._planned_LE.tolist()
            own = {"plan": self.plan.to_plain(), "choices": choices, "peak_bytes": self.peak_bytes}
        gathered = gather_to_root(own, self.mesh.world, "recompute-plan", self.mesh.recorder)
        if gathered is None or any(each is None for each in gathered):
            return None
        return {"of": self._of(), "ranks": gathered}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Goes on with the plan of a checkpoint, if it was made for this run and layout."""
        if not state or state.get("of") != self._of():
            return
        own = state["ranks"][self.mesh.world.rank]
        self.plan = Plan.from_plain(own["plan"])
        self.peak_bytes = own["peak_bytes"]
        self._planned_LE = None if own["choices"] is None else torch.tensor(own["choices"])

    def _of(self) -> str:
        """What a plan depends on, beside what is measured."""
        given = as_mapping(self.config)
        parts = {name: given[name] for name in ("model", "router", "parallel", "recompute", "optimizer")}
        train = {name: given["train"][name] for name in ("batch", "accumulate", "precision")}
        return digest([parts, train, given["data"]["seq_len"], self.mesh.world.size])

    def _keep_to_budget(self) -> None:
        """Plans for less where the plan took more than the budget, on any rank of the stage."""
        assert self.plan is not None and self.peak_bytes is not None
        excess = torch.tensor([self.peak_bytes - self.planner.budget], device=self.mesh.device)
        over = int(
            all_reduce(excess, self.mesh.stage, "recompute-plan", self.mesh.recorder, torch.distributed.ReduceOp.MAX)
        )
        if over <= 0 or self._measurement is None:
            return
        self.say(f"lynx: the plan took {over / 2**20:,.1f} MiB more than recompute.budget; planning for as much less")
        # And some more, so that it does not take many turns.
        self._spare += over + self.planner.budget // 100
        self._make_plan()

    def _make_plan(self) -> None:
        """By one rank of the stage: a search that the clock ends is another one on each."""
        assert self._measurement is not None
        found: Plan | str = ""
        if self.mesh.stage.rank == 0:
            try:
                found = self.planner.plan(self._measurement, self._spare)
            except UserError as error:
                found = str(error)
        found = share_from_root(found, self.mesh.stage, "recompute-plan", self.mesh.recorder)
        if isinstance(found, str):
            raise UserError(found)
        self.plan, self.peak_bytes = found, None
        self.say(describe(self.plan))

    def _measure_again(self) -> None:
        self.plan, self.peak_bytes, self._planned_LE, self._seen_LE = None, None, None, None
        self._measurement: Measurement | None = None
        self._spare = 0
        self._took: list[float] = []
        self._exposed = 0.0
        self._left = _WARM_UP
        self.recomputation.meter = None

    def _measure(self, run: Callable[[], Tensor]) -> None:
        """One step with everything on demand; the last one plans."""
        recomputation = self.recomputation
        recomputation.schedule = self.planner.everything_dropped()
        if self._left:
            run()
            self._left -= 1
            return
        if recomputation.meter is None:
            recomputation.meter = Meter(self.mesh.device)
        before = sum(recomputation.spent.seconds())
        start = _now(self.mesh.device)
        counts = run()
        self._took.append(_now(self.mesh.device) - start)
        self._exposed += sum(recomputation.spent.seconds()) - before
        self._see(counts)
        if len(self._took) < self.config.recompute.measure_steps:
            return
        meter, recomputation.meter = recomputation.meter, None
        self._measurement = self.planner.measured(meter, self._took, self._exposed)
        self._planned_LE, self._seen_LE = self._seen_LE, None
        self._make_plan()

    def _see(self, counts: Tensor) -> None:
        if counts.numel():
            choices_LE = counts[:, : -len(SLOTS)]
            self._seen_LE = choices_LE if self._seen_LE is None else self._seen_LE + choices_LE

    def _peak(self, work: Callable[[], None]) -> int:
        """The most that this rank has at once in `work`, all in."""
        if self.mesh.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.mesh.device)
            work()
            return torch.cuda.max_memory_allocated(self.mesh.device)
        return held_bytes(self.model, self.optimizer) + peak_bytes(work)


def drift(before_LE: Tensor, since_LE: Tensor) -> float:
    """Part of choices that went to other experts since; mean over layers."""
    shares = [each / each.sum(1, keepdim=True).clamp(min=1) for each in (before_LE.double(), since_LE.double())]
    return float((shares[0] - shares[1].to(shares[0].device)).abs().sum(1).mean() / 2)


def describe(plan: Plan) -> str:
    """A line for the user."""
    again = plan.hidden_seconds + plan.exposed_seconds
    part = f"{100 * plan.hidden_seconds / again:.0f} % of it under communication" if again else "nothing to recompute"
    return (
        f"lynx: planned by {plan.solver}: {plan.step_seconds:.3f} s a step, {again:.3f} s of recomputation ({part}), "
        f"{plan.peak_bytes / 2**20:,.0f} of {plan.budget_bytes / 2**20:,.0f} MiB"
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
