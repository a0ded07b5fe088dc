"""Benchmark `layout-memory`: what each rank holds under every layout of ranks, beside what the planner says it would.

Real steps of the trainer, bytes counted by storage: weights, gradients, optimizer state, and the most that a step has
beside them at once. The planner is that of `wastenot simulate`, asked about the same configuration.
"""

from __future__ import annotations

import itertools
import json
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...launch.config import DataConfig, LogConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from ...launch.local import run_ranks
from ...launch.optimizer_config import AdapproxConfig
from ...launch.planner_input import from_config
from ...moe.config import ModelConfig, MoEConfig
from ...parallel.config import ParallelConfig
from ...parallel.lynx.assess import assess
from ...parallel.lynx.cluster import read_cluster
from ...parallel.lynx.question import Question
from . import layout_memory_ranks
from .parity import LAYOUTS, name_of
from .report import Goal, Report, Row, at_most, environment

STATIC = ("weights", "gradients", "optimizer")
PARTS = (*STATIC, "step")
"""What bytes are for; `step` is the most beside the others while a step runs: activations, buffers, temporaries."""

MOST_STATIC, MOST_TOTAL = 0.02, 0.15
"""Largest error of the planner, as a part of what was measured."""

FEW = (LAYOUTS[0], LAYOUTS[1], LAYOUTS[5], LAYOUTS[9], LAYOUTS[13])
"""Layouts of the optimizers and precisions beside the first."""

HEADINGS = {
    "optimizer": "optimizer",
    "precision": "type",
    "layout": "layout",
    "ranks": "ranks",
    "rank": "worst rank",
    "static_mib": "static, MiB",
    "static_percent": "error, %",
    "step_mib": "step, MiB",
    "step_percent": "error, %",
    "total_mib": "total, MiB",
    "estimate_mib": "planner, MiB",
    "total_percent": "error, %",
}

Bytes = Mapping[str, float]
"""By part."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    layout: ParallelConfig
    optimizer: Literal["adamw", "adapprox"] = "adamw"
    precision: Literal["fp32", "bf16"] = "fp32"


def cases(quick: bool) -> list[Case]:
    """AdamW in fp32 under every layout (`quick`: of at most 2 ranks); Adapprox and bf16 under few of them."""
    found = [Case(layout=layout) for layout in LAYOUTS if not quick or layout.world() <= 2]
    found += [Case(layout=layout, optimizer="adapprox") for layout in FEW if not quick]
    return found + [Case(layout=layout, precision="bf16") for layout in FEW if not quick]


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Trains under every layout. Raises RuntimeError where ranks fail."""
    rows: list[Row] = []
    for world, group in itertools.groupby(sorted(cases(quick), key=_world), key=_world):
        those = list(group)
        say(f"{len(those)} runs on {world} ranks")
        configs = [configure(case) for case in those]
        for case, config, ranks in zip(those, configs, measure(configs), strict=True):
            rows.append(compare(case, ranks, estimate(config)))
    rows.sort(key=lambda row: (row["precision"] != "fp32", row["optimizer"] != "adamw"))
    notes = [
        "static: weights, gradients and optimizer state between steps; step: the most beside them while a step runs",
        "the rank shown is the one with the largest error of the total; the JSON object has all ranks",
        "tokens are drawn evenly, by which experts get about as many; on text the fullest rank has more",
        "Adapprox at its largest rank, which is what the planner counts",
        "what no tensor holds (driver, libraries, fragmentation) is on neither side",
    ]
    if quick:
        notes.append("quick: left out layouts of 4 ranks, Adapprox and bf16")
    return Report(
        name="layout-memory",
        command=command,
        env=environment(["numpy"]),
        rows=rows,
        goals=goals(rows),
        notes=notes,
        headings=HEADINGS,
    )


def configure(case: Case) -> TrainConfig:
    """A run of a model of 20 M parameters, every second layer of 8 experts, at 4,096 tokens a step."""
    adapprox = AdapproxConfig(rank_threshold=1e-9) if case.optimizer == "adapprox" else AdapproxConfig()
    moe = MoEConfig(experts=8, d_expert=512, every=2)
    return TrainConfig(
        model=ModelConfig(vocab_size=8192, d_model=384, layers=4, heads=6, kv_heads=2, d_ff=1024, moe=moe),
        parallel=case.layout,
        optimizer=OptimizerConfig(name=case.optimizer, adapprox=adapprox),
        schedule=ScheduleConfig(warmup_steps=1),
        data=DataConfig(tokenizer="bytes", seq_len=256),
        train=LoopConfig(steps=2, batch=16, accumulate=4, eval_batch=16, precision=case.precision, sample_tokens=0),
        log=LogConfig(dir="unused"),
    )


def measure(configs: Sequence[TrainConfig]) -> list[list[dict[str, int]]]:
    """Of each configuration, all of one number of ranks, every rank's bytes by part.

    Raises RuntimeError where the ranks fail; they have said why.
    """
    world = configs[0].parallel.world()
    with tempfile.TemporaryDirectory(prefix="wastenot-layout-memory-") as folder:
        told, result = Path(folder) / "configs", Path(folder) / "result.json"
        told.write_bytes(pickle.dumps(list(configs)))
        code = run_ranks([str(told), str(result)], world, module=layout_memory_ranks.__name__)
        if code != 0:
            raise RuntimeError(f"layout-memory on {world} ranks ended with code {code}; nothing was measured")
        return json.loads(result.read_text(encoding="utf-8"))


def estimate(config: TrainConfig) -> list[dict[str, int]]:
    """What the planner says that every rank holds, by part, where all that the backward reads is kept."""
    given = from_config(config)
    question = Question(
        shape=given.shape,
        layout=given.layout,
        cluster=read_cluster("cpu-gloo"),
        optimizer=given.optimizer,
        skew=given.skew,
        schedule=given.schedule,
        cut=given.cut,
        solver="none",
        # Whether it fits is not asked.
        budget=2**50,
    )
    answer = assess(question)
    found = []
    for stage, peak in zip(answer.ranks, answer.peak_bytes, strict=True):
        parts = {part: stage.components[f"dense {part}"] + stage.components[f"expert {part}"] for part in STATIC}
        rest = peak - sum(parts.values()) - stage.components["context"] - stage.components["fragmentation"]
        found += [{**parts, "step": rest}] * config.parallel.stage()
    return found


def compare(case: Case, measured: Sequence[Bytes], estimated: Sequence[Bytes]) -> Row:
    """One layout: the rank about which the planner is most wrong, and all of them."""
    ranks = [
        {"measured": dict(own), "estimated": dict(planned), **errors(own, planned)}
        for own, planned in zip(measured, estimated, strict=True)
    ]
    worst = max(range(len(ranks)), key=lambda rank: abs(ranks[rank]["total_error"]))
    own, planned = measured[worst], estimated[worst]
    return {
        "optimizer": case.optimizer,
        "precision": case.precision,
        "layout": name_of(case.layout),
        "ranks": case.layout.world(),
        "rank": worst,
        **{f"{what}_error": ranks[worst][f"{what}_error"] for what in (*PARTS, "static", "total")},
        "static_mib": sum(own[part] for part in STATIC) / 2**20,
        "step_mib": own["step"] / 2**20,
        "total_mib": sum(own[part] for part in PARTS) / 2**20,
        "estimate_mib": sum(planned[part] for part in PARTS) / 2**20,
        **{f"{what}_percent": 100 * ranks[worst][f"{what}_error"] for what in ("static", "step", "total")},
        "by_rank": ranks,
    }


def errors(measured: Bytes, estimated: Bytes) -> dict[str, float]:
    """(estimated - measured) / measured of each part, of what stays between steps (`static`), and of all (`total`)."""
    sums: dict[str, tuple[str, ...]] = {**{part: (part,) for part in PARTS}, "static": STATIC, "total": PARTS}
    return {
        f"{what}_error": sum(estimated[part] for part in parts) / sum(measured[part] for part in parts) - 1
        for what, parts in sums.items()
    }


def goals(rows: Sequence[Row]) -> list[Goal]:
    """The largest errors over all layouts and ranks, for each optimizer and precision."""
    found: list[Goal] = []
    for optimizer, precision in dict.fromkeys((row["optimizer"], row["precision"]) for row in rows):
        ranks = [
            rank
            for row in rows
            if (row["optimizer"], row["precision"]) == (optimizer, precision)
            for rank in row["by_rank"]
        ]
        for what, said, most in (
            ("static", "weights, gradients and optimizer state", MOST_STATIC),
            ("total", "peak of a rank", MOST_TOTAL),
        ):
            worst = max(abs(rank[f"{what}_error"]) for rank in ranks)
            found.append(at_most(f"{optimizer}, {precision}: error of {said}", worst, most))
    return found


def _world(case: Case) -> int:
    return case.layout.world()
