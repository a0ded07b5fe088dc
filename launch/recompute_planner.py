"""From a run's own measurements to the recomputation that it runs: `recompute.mode: lynx`.

    everything_dropped   what is run while it is measured: everything is computed again on demand, so that it fits if
                         anything does
    Measurement          some such steps
    make_plan            a plan for `recompute.budget`, by the solvers of parallel/lynx

All ranks of a pipeline stage come to the same plan: measurements are means over them, sizes the largest.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ..moe.decoder import Decoder
from ..parallel.collectives import all_reduce
from ..parallel.lynx.cluster import Allowance, Cluster, read_cluster
from ..parallel.lynx.evaluate import evaluate
from ..parallel.lynx.measured import Measured, by_name, droppable, with_measured
from ..parallel.lynx.problem import Stage, Window
from ..parallel.lynx.question import Question
from ..parallel.lynx.solution import InfeasibleError
from ..parallel.lynx.solve import solve
from ..parallel.lynx.spare import keep_what_fits
from ..parallel.lynx.stages import Costs
from ..parallel.mesh import Mesh
from ..parallel.meter import Meter
from ..parallel.recomputation import Schedule
from ..parallel.recompute import qualified
from .config import TrainConfig
from .env import detect
from .errors import UserError
from .planner_input import PlannerInput, from_config

PART = 0.9
"""Of the memory there is, that a budget of `auto` takes."""
SLOWDOWN = {"cpu": 0.7, "cuda": 0.95}
"""rho of windows: compute under a busy link, as a part of its speed alone. Assumed; on CPUs gloo and the network's own
work share the cores."""


@dataclass(frozen=True)
class Plan:
    """What a stage of the pipeline recomputes, and what is expected of it; plain, for checkpoints."""

    dropped: tuple[str, ...]
    windows: Mapping[str, tuple[str, ...]]
    solver: str
    step_seconds: float
    """Expected of a step."""
    hidden_seconds: float
    """Of recomputation in a step, under windows ..."""
    exposed_seconds: float
    """... and not."""
    peak_bytes: int
    """Expected at most on the fullest rank of the stage: weights, gradients, optimizer state and activations."""
    budget_bytes: int

    @property
    def schedule(self) -> Schedule:
        """To run."""
        return Schedule(frozenset(self.dropped), self.windows)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        windows = {name: list(each) for name, each in self.windows.items()}
        return {**asdict(self), "dropped": list(self.dropped), "windows": windows}

    @classmethod
    def from_plain(cls, given: Mapping[str, Any]) -> Plan:
        """What `to_plain` gave."""
        windows = {name: tuple(each) for name, each in given["windows"].items()}
        return cls(**{**given, "dropped": tuple(given["dropped"]), "windows": windows})


@dataclass(frozen=True)
class Measurement:
    """Steps in which everything was computed again on demand, means over the ranks of a stage."""

    kinds: Mapping[str, Measured]
    step_seconds: float
    recompute_seconds: float
    """Part of them."""


class Planner:
    """Plans for one rank's stage of the pipeline."""

    def __init__(self, config: TrainConfig, mesh: Mesh, model: Decoder) -> None:
        """Raises UserError where nothing is known of such a run."""
        self.config, self.mesh = config, mesh
        self.budget = budget_bytes(config, mesh)
        try:
            given = from_config(config, ranks=mesh.world.size)
            self.costs = Costs(self._question(given))
        except ValueError as error:
            raise UserError(f"recompute.mode: lynx has no plan for this run: {error}; use full or selective") from error
        self.time_limit = self.costs.question.time_limit
        """Seconds for each stage's search."""
        own = self.costs.stages(mesh.pipeline.rank).stages
        self.stages: list[tuple[Stage, tuple[int, ...]]] = [
            (stage, tuple(model.stages.layers[number])) for stage, number in zip(own, model.stages.own, strict=True)
        ]

    def _question(self, given: PlannerInput) -> Question:
        return Question(
            shape=given.shape,
            layout=given.layout,
            cluster=_cluster(self.mesh),
            optimizer=given.optimizer,
            skew=given.skew,
            schedule=given.schedule,
            solver=self.config.recompute.solver,
            budget=self.budget,
            fill_stalls=False,
            cut=given.cut,
        )

    def everything_dropped(self) -> Schedule:
        """All that can be computed again is, on demand."""
        tensor = self.mesh.tensor.size
        return Schedule(
            frozenset(
                qualified(number, name)
                for stage, numbers in self.stages
                for layer, number in zip(stage.layers, numbers, strict=True)
                for name in droppable(layer, tensor)
            )
        )

    def measured(self, meter: Meter, step_seconds: list[float], exposed_seconds: float) -> Measurement:
        """What `meter` saw in so many steps, and how long they took; all ranks of the stage call it together."""
        seconds = meter.seconds()
        micro_batches = self.config.train.accumulate * len(step_seconds)
        kinds: dict[str, Measured] = {}
        for kind, numbers in self._numbers().items():
            names = sorted({name.partition(".")[2] for name in meter.bytes if int(name.partition(".")[0]) in numbers})
            windows = sorted({each.name for each in self._windows(kind)})
            times = [_mean(seconds, numbers, name, micro_batches) for name in names]
            spans = [_mean(meter.windows, numbers, name, micro_batches) for name in windows]
            sizes = [max(_sizes(meter.bytes, numbers, name, micro_batches)) for name in names]
            times = self._over_ranks(times, "mean")
            spans = self._over_ranks(spans, "mean")
            sizes = self._over_ranks(sizes, "max")
            kinds[kind] = Measured(
                seconds={name: time for name, time in zip(names, times, strict=True) if time > 0.0},
                bytes={name: int(size) for name, size in zip(names, sizes, strict=True)},
                windows=dict(zip(windows, spans, strict=True)),
            )
        whole, part = self._over_ranks([statistics.median(step_seconds), exposed_seconds / len(step_seconds)], "mean")
        return Measurement(kinds, whole, part)

    def plan(
        self, measurement: Measurement, spare: int = 0, *, solver: str | None = None, budget: int | None = None
    ) -> Plan:
        """The plan for the run's solver and budget, or others, that leaves `spare` bytes of it.

        Raises UserError where nothing fits.
        """
        solver, budget = solver or self.config.recompute.solver, self.budget if budget is None else budget
        dropped: list[str] = []
        windows: dict[str, tuple[str, ...]] = {}
        hidden = exposed = 0.0
        peak = 0
        for stage, numbers in self.measured_stages(measurement, budget - spare):
            try:
                solution = solve(stage, solver, self.time_limit)
            except InfeasibleError as error:
                raise UserError(
                    f"recompute.budget: {_mib(budget)} is too little for this run with solver {solver}; the smallest "
                    f"that fits is {_mib(error.smallest + spare)}"
                ) from error
            assignment = keep_what_fits(stage, solution.assignment)
            named = by_name(stage, assignment, numbers)
            dropped += named.dropped
            windows |= named.windows
            outcome = evaluate(stage, assignment)
            hidden += outcome.hidden * self.config.train.accumulate
            exposed += outcome.exposed * self.config.train.accumulate
            peak = max(peak, outcome.peak)
        base = measurement.step_seconds - measurement.recompute_seconds
        return Plan(tuple(dropped), windows, solver, base + exposed, hidden, exposed, peak, budget)

    def measured_stages(self, measurement: Measurement, budget: int) -> list[tuple[Stage, tuple[int, ...]]]:
        """This rank's stages with what was measured, and the numbers of their layers."""

        def layer(each):
            measured = measurement.kinds[each.name]
            return with_measured(each, measured)

        return [
            (replace(stage, layers=tuple(layer(each) for each in stage.layers), budget=budget), numbers)
            for stage, numbers in self.stages
        ]

    def _numbers(self) -> dict[str, set[int]]:
        """Layers of each kind."""
        found: dict[str, set[int]] = {}
        for stage, numbers in self.stages:
            for layer, number in zip(stage.layers, numbers, strict=True):
                found.setdefault(layer.name, set()).add(number)
        return found

    def _windows(self, kind: str) -> list[Window]:
        layer = next(layer for stage, _ in self.stages for layer in stage.layers if layer.name == kind)
        return [*layer.forward, *layer.backward_windows]

    def _over_ranks(self, values: list[float], how: str) -> list[float]:
        stage = self.mesh.stage
        told = torch.tensor(values, dtype=torch.float64, device=self.mesh.device)
        op = dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM
        all_reduce(told, stage, "recompute-plan", self.mesh.recorder, op)
        return (told if how == "max" else told / stage.size).tolist()


def _sizes(found: Mapping[str, list[Any]], numbers: set[int], name: str, micro_batches: int) -> list[float]:
    """Of each layer, the sum over what has this name in a micro-batch; means over micro-batches."""
    return [sum(found.get(qualified(number, name), [])) / micro_batches for number in sorted(numbers)]


def _mean(found: Mapping[str, list[float]], numbers: set[int], name: str, micro_batches: int) -> float:
    return statistics.fmean(_sizes(found, numbers, name, micro_batches))


def _mib(num_bytes: int) -> str:
    """Rounded up."""
    return f"{-(-num_bytes // 2**20)}MiB"


def budget_bytes(config: TrainConfig, mesh: Mesh) -> int:
    """`recompute.budget` of a rank; `auto` is what the device has, or a rank's part of the machine's memory."""
    given = config.recompute.budget
    if given != "auto":
        return int(given)
    if mesh.device.type == "cuda":
        return int(PART * torch.cuda.get_device_properties(mesh.device).total_memory)
    return int(PART * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // detect(os.environ).local_world


def _cluster(mesh: Mesh) -> Cluster:
    """What is assumed where nothing is measured: the budget is of tensors alone."""
    cluster = read_cluster("cpu-gloo" if mesh.device.type == "cpu" else "h100-nvlink8-ib")
    links = tuple(replace(link, slowdown=SLOWDOWN[mesh.device.type]) for link in cluster.links)
    return replace(cluster, links=links, allowance=Allowance(context=0.0, fragmentation=0.0))
