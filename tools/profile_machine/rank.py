"""One rank of `wastenot profile`: measures with the others; rank 0 writes the file and speaks.

As a program (`-m wastenot.tools.profile_machine.rank FILE`) it reads its job from FILE, which the command has pickled.
"""

from __future__ import annotations

import datetime
import os
import pickle
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.distributed as dist

from ...launch import env
from ...launch.console import RunConsole
from ...launch.errors import UserError
from ...launch.exits import OK, guarded
from ...launch.memory import keep_freed_memory
from ...parallel.collectives import tune_pieces
from ...parallel.config import ParallelConfig
from ...parallel.lynx.calibration import Calibration, LayerTimes, calibrated, fingerprint, write_calibration
from ...parallel.lynx.cluster import Cluster
from ...parallel.lynx.shape import LayerKind
from ...parallel.lynx.work import work_of
from ...parallel.mesh import Mesh, make_mesh
from ..doctor import machine
from ..output import replacing
from . import device as device_figures
from . import links as link_figures
from .clock import Clock
from .job import Job, config_of, layers_to_time
from .kernels import DTYPES, Sizes, limits
from .layer import TimedLayer, Times, Waits, by_names, slowest, typical
from .show import show

_TIMEOUT_S = 120.0
"""Of a collective."""
_BUSY = 0.5
"""Of a core to each rank: the load at the start, from which on others are said to disturb."""
_LONGEST_PASS_S = 5.0
"""Of a layer, forward and backward, that is still timed."""


def run_rank(job: Job, rank: env.Rank) -> int:
    """Measures, from the start of this rank's process group to its end; its process is as training sets it."""
    device = env.pick_device(rank)
    keep_freed_memory()
    if job.config is not None and job.config.train.deterministic:
        torch.set_deterministic_debug_mode("warn" if device.type == "cuda" else "error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    env.start(rank, ParallelConfig(timeout_seconds=_TIMEOUT_S), device)
    try:
        calibration = Measurement(job, rank, device, RunConsole(speaks=rank.rank == 0).say).run()
    finally:
        env.stop()
    if rank.rank == 0:
        with replacing(job.output) as beside:
            write_calibration(calibration, beside)
        show(calibration, job)
    return OK


class Measurement:
    """All parts in order; each is a method that adds to the calibration."""

    def __init__(self, job: Job, rank: env.Rank, device: torch.device, say: Callable[[str], None]) -> None:
        expert = job.layout.expert if rank.world % job.layout.expert == 0 else 1
        self.job, self.rank, self.say, self.clock = job, rank, say, Clock(device)
        self.mesh: Mesh = make_mesh(ParallelConfig(expert=expert), device, Waits())
        self.parts: dict[str, Any] = {}
        self.notes: list[str] = []
        self.started = time.perf_counter()
        given = 0 if job.config is None else job.config.parallel.piece_bytes
        self.piece_bytes = tune_pieces(self.mesh) if given == "auto" else given

    def run(self) -> Calibration:
        """The whole, the same on every rank but for what `doctor.machine` says of each."""
        self._note_others()
        self._device()
        self._links()
        self._layers()
        facts = machine()
        return Calibration(
            machine=_words(self.rank, self.clock.device, facts),
            date=datetime.date.today().isoformat(),
            versions={name: text for name, text in facts["versions"].items() if text},
            cluster=self.job.cluster.name,
            notes=tuple(self.notes),
            **self.parts,
        )

    def _note_others(self) -> None:
        load = os.getloadavg()[0]
        if self.clock.device.type == "cpu" and load > _BUSY * self.rank.local_world:
            self.notes.append(
                f"other programs ran too (load {load:.1f}): these are times on a machine that is shared so"
            )

    def _tell(self, what: str) -> None:
        self.say(f"profile, {time.perf_counter() - self.started:3.0f} s: {what}")

    def _gather(self, mine: Any) -> list[Any]:
        if self.rank.world == 1:
            return [mine]
        everyone: list[Any] = [None] * self.rank.world
        dist.all_gather_object(everyone, mine)
        return everyone

    def _cluster(self) -> Cluster:
        """With what was measured so far."""
        return calibrated(self.job.cluster, Calibration(**self.parts))

    def _device(self) -> None:
        job, device = self.job, self.clock.device
        ranks = f"{self.rank.world} ranks at once" if self.rank.world > 1 else "1 rank"
        self._tell(f"matrix products, attention, memory; {ranks}")
        sizes = Sizes(
            shape=job.shape,
            layout=job.layout,
            skew=job.skew,
            limits=limits(device, quick=job.effort.is_quick),
            device=device,
        )
        compute = next(name for name, dtype in DTYPES.items() if dtype == sizes.dtype)
        self._gather(None)
        found, mine = device_figures.measure(sizes, self.clock, job.effort.kernels_s)
        made = device_figures.figures(found, device_figures.middle(self._gather(mine)), compute)
        self.parts |= {
            "device": {"launch": made.launch, "bandwidth": made.bandwidth},
            "peak": made.peak,
            "efficiency": made.efficiency,
        }
        for name in device_figures.CLASSES:
            if name not in made.efficiency:
                self.notes.append(f"efficiency.{name}: not measured: the model has none of it")
        if job.layout.compute not in made.peak:
            self.notes.append(f"device.peak.{job.layout.compute}: not measured; efficiencies are of {compute}")

    def _links(self) -> None:
        job, device = self.job, self.clock.device
        world = self.rank.world
        if world == 1:
            self.notes.append("links: not measured: one rank has none; use --nproc 2")
            return
        found: dict[str, dict[str, float]] = {}
        samples: dict[str, tuple[tuple[float, float], ...]] = {}
        for level in link_figures.levels(job.cluster.links, world, self.rank.rank):
            name = level.link.name
            self._tell(f"{name}: collectives between {level.axis.size} ranks")
            message_sizes = link_figures.sizes(device, quick=job.effort.is_quick)
            measured = link_figures.measure(level, self.clock, message_sizes, self.piece_bytes, job.effort.rounds)
            fit = link_figures.fit(measured, level)
            self._tell(f"{name}: compute beside an exchange")
            rho = link_figures.speed_beside(level, self.clock, fit, self.piece_bytes, job.effort.rounds)
            found[name] = {**asdict(fit), "slowdown": rho}
            samples |= {f"{name} {each}": tuple(pairs) for each, pairs in measured.items()}
        reached = {link.name for link in job.cluster.links} - set(found)
        if reached:
            self.notes.append(
                f"links.{', links.'.join(sorted(reached))}: not measured: {world} ranks do not reach so far"
            )
        # Groups of one level measure at the same time; rank 0's speak for all.
        self.parts |= {"links": self._gather(found)[0], "samples": self._gather(samples)[0]}

    def _layers(self) -> None:
        job = self.job
        memory = _memory_bytes(self.clock.device) / self.rank.local_world
        kinds, notes = layers_to_time(job, self.rank.world, min(self._gather(memory)))
        self.notes += notes
        work = fingerprint(job.shape, job.layout, job.skew)
        found: dict[str, LayerTimes] = {}
        for kind in kinds:
            self._tell(f"a {kind} layer, operator by operator")
            seconds = self._layer(kind)
            if seconds:
                found[kind] = LayerTimes(work=work, seconds=seconds)
        self.parts["layers"] = found

    def _layer(self, kind: LayerKind) -> Mapping[str, float]:
        job = self.job
        predicted = work_of(job.shape, job.layout, self._cluster(), job.skew, kind).layer
        timed = TimedLayer(config_of(job), kind, job.skew, self.mesh, self.piece_bytes)
        timed.run()
        start = time.perf_counter()
        timed.run()
        one = max(self._gather(time.perf_counter() - start))
        if one > _LONGEST_PASS_S:
            self.notes.append(
                f"layers.{kind}: not measured: one pass takes {one:.1f} s, more than {_LONGEST_PASS_S:g} s"
            )
            return {}
        rounds = max(5, min(100, int(job.effort.layer_s / one)))
        of_ranks: list[list[Times]] = self._gather([timed.run() for _ in range(rounds)])
        passes = [slowest(at_once) for at_once in zip(*of_ranks, strict=True)]
        first, middle, third = quantiles([sum(each.values()) for each in passes], n=4, method="inclusive")
        seconds = by_names(typical(passes), predicted)
        left = [each.name for each in (*predicted.operators, *predicted.backward) if each.name not in seconds]
        left = [name for name in left if name != "input"]
        if left:
            self.notes.append(f"layers.{kind}: predicted, not measured: {', '.join(left)}")
        if kind == "moe":
            self.notes.append(
                "layers.moe: expert up, expert activation and expert down were timed as one call and shared out as "
                "predicted"
            )
        self.notes.append(
            f"layers.{kind}: {rounds} passes of {middle * 1e3:.3g} ms, the middle half within "
            f"{(third - first) / middle:.0%} of that"
        )
        return seconds


def _memory_bytes(device: torch.device) -> float:
    """That ranks of this host may share out."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * float(torch.cuda.device_count())
    return float(machine()["memory_bytes"] or 2**33)


def _words(rank: env.Rank, device: torch.device, facts: Mapping[str, Any]) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {facts['cores']} cores, {torch.get_num_threads()} threads each"
    ranks = "1 rank" if rank.world == 1 else f"{rank.world} ranks"
    backend = f" ({dist.get_backend()})" if dist.is_initialized() else ""
    return f"{ranks}{backend} on {name}, {platform.system()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(file: str) -> int:
    """One rank that the command started."""
    job: Job = pickle.loads(Path(file).read_bytes())

    def work() -> int:
        try:
            return run_rank(job, env.detect(os.environ))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
