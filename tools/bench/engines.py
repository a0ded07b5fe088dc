"""Benchmark `engines`: a run has the same losses whichever engine trains it.

Each run is a real one, from a YAML file to its metrics, with our router and our optimizer; the runs of a case differ
in `engine` (and ZeRO stage) alone, begin with the same weights and read the same samples. The native run of the same
layout is what the others are held against, step by step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...launch.config import TrainConfig
from ...launch.engine_config import DeepSpeedConfig, EngineName, what_is_missing
from ...launch.errors import UserError
from ...launch.optimizer_config import OptimizerConfig
from ...moe.config import RectifyConfig, RouterConfig
from ...parallel.config import ParallelConfig
from .parity import STEPS, Curve, configure, largest_difference, make_corpus, name_of, train
from .peers import megatron
from .report import Goal, Report, Row, at_most, environment

BOUND = 1e-4
"""Largest relative difference of a loss, at any step."""

ROUTERS = {
    "dropless": RouterConfig(),
    "rectified": RouterConfig(capacity_factor=1.0, rectify=RectifyConfig(intra=True, fill=True)),
}

HEADINGS = {
    "engine": "engine",
    "layout": "layout",
    "router": "router",
    "optimizer": "optimizer",
    "loss_difference": "loss",
    "grad_norm_difference": "norm",
    "last_loss": "last loss",
}


@dataclass(frozen=True)
class Contender:
    """An engine at a layout."""

    engine: EngineName
    layout: ParallelConfig
    zero: int = 0

    @property
    def name(self) -> str:
        """As rows call it."""
        return f"deepspeed, ZeRO {self.zero}" if self.engine == "deepspeed" else self.engine


DATA, EXPERTS, STAGES = ParallelConfig(data=2), ParallelConfig(data=2, expert=2), ParallelConfig(data=1, pipeline=2)

CONTENDERS = (
    *(Contender("deepspeed", EXPERTS, zero) for zero in (0, 1, 2)),
    Contender("deepspeed", DATA, 3),
    *(Contender("megatron", layout) for layout in (DATA, EXPERTS, STAGES)),
)


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Trains under every engine. Raises UserError where one is not installed, RuntimeError where a run fails."""
    for engine in ("deepspeed", "megatron"):
        if missing := what_is_missing(engine):
            raise UserError(f"bench engines: {missing.partition(', or')[0]}")
    if reason := megatron.missing():
        raise UserError(f"bench engines: Megatron-Core {reason}")
    routers = ["rectified"] if quick else list(ROUTERS)
    rows: list[Row] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory(prefix="wastenot-engines-") as folder:
        corpus = make_corpus(Path(folder))
        for router in routers:
            for optimizer in ("adapprox", "adamw"):
                natives: dict[str, Curve] = {}
                for contender in CONTENDERS:
                    layout = name_of(contender.layout)
                    for one in (Contender("native", contender.layout), contender):
                        if one.engine == "native" and layout in natives:
                            continue
                        say(f"{router}, {optimizer}: {one.name}, {layout}")
                        where = Path(folder) / f"{router}-{optimizer}-{one.name}-{layout}".replace(", ", "-")
                        curve = _train(config_of(one, router, optimizer, corpus, where))
                        natives.setdefault(layout, curve)
                        rows.append(compare(one, router, optimizer, curve, natives[layout]))
                goals.append(goal(router, optimizer, rows))
    notes = [
        f"largest relative difference over {STEPS} steps to the native run of the same layout, in fp32",
        "EP experts over ranks (folded over DP, the copies), PP pipeline stages; 2 ranks each",
        "Megatron-Core runs through a shim that makes its CUDA calls CPU calls",
    ]
    if quick:
        notes.append("quick: left out the dropless router")
    return Report(
        name="engines",
        command=command,
        env=environment(["numpy", "deepspeed", "megatron-core"]),
        rows=rows,
        goals=goals,
        notes=notes,
        headings=HEADINGS,
    )


def config_of(contender: Contender, router: str, optimizer: str, corpus: Path, where: Path) -> TrainConfig:
    """A run of `bench parity`'s model under one engine."""
    config = configure("dropless", "fp32", contender.layout, corpus, where)
    return replace(
        config,
        router=ROUTERS[router],
        optimizer=OptimizerConfig(name=optimizer, lr=config.optimizer.lr),  # pyright: ignore[reportArgumentType]
        engine=contender.engine,
        deepspeed=DeepSpeedConfig(zero=contender.zero),
    )


def compare(contender: Contender, router: str, optimizer: str, curve: Curve, native: Curve) -> Row:
    """A run beside the native one of its layout."""
    return {
        "engine": contender.name,
        "layout": name_of(contender.layout),
        "router": router,
        "optimizer": optimizer,
        "loss_difference": largest_difference(curve.losses, native.losses),
        "grad_norm_difference": largest_difference(curve.norms, native.norms),
        "first_loss": curve.losses[0],
        "last_loss": curve.losses[-1],
        "dropped_ratio": curve.dropped,
    }


def goal(router: str, optimizer: str, rows: list[Row]) -> Goal:
    """Of all engines with this router and optimizer."""
    found = [row["loss_difference"] for row in rows if (row["router"], row["optimizer"]) == (router, optimizer)]
    # numpy's maximum, unlike Python's, keeps a NaN.
    return at_most(f"{router}, {optimizer}: loss", float(np.max(found)), BOUND)


def _train(config: TrainConfig) -> Curve:
    is_megatron = config.engine == "megatron"
    return train(config, module="wastenot.tools.bench.shimmed_rank" if is_megatron else "wastenot.launch.train")
