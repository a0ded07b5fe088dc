"""Benchmark `rectify-speed`: what rectification costs in step time, bytes and memory, on real ranks over a real link.

Vanilla, IR, FR, both and dropless train side by side in the same ranks and take turns; every figure stands beside
the skew of the expert load that it was measured at.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ...launch.config import DataConfig, LogConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from ...launch.corpus import prepare
from ...moe.config import ModelConfig, MoEConfig
from ...parallel.config import ParallelConfig
from . import rectify_ranks, rectify_trace
from .link import Link, NoLinkError, run_ranks_on, shaped_link
from .rectify_cells import VOCABULARY
from .rectify_contest import CAPACITY_FACTOR, Case, Contest
from .rectify_picture import draw_speed
from .report import Goal, Report, Row, at_most, environment

FOLDER = Path("runs/rectify-speed")
"""Where recorded traces stay, below the current folder."""

RATE = "1gbit"
EXPERTS, LAYERS, SEQ_LEN, SEQUENCES = 8, 4, 128, 8
BASE = TrainConfig(
    model=ModelConfig(
        vocab_size=VOCABULARY,
        d_model=256,
        layers=LAYERS,
        heads=4,
        kv_heads=2,
        tie_embeddings=True,
        moe=MoEConfig(experts=EXPERTS, d_expert=512),
    ),
    parallel=ParallelConfig(timeout_seconds=120),
    optimizer=OptimizerConfig(lr=1e-4),
    schedule=ScheduleConfig(kind="constant"),
    data=DataConfig(tokenizer=f"bpe:{VOCABULARY}", seq_len=SEQ_LEN),
    train=LoopConfig(batch=SEQUENCES),
    log=LogConfig(dir="unused", every=10),
)
ROUTERS = ("uniform", "skewed", "bursty", "replay")
DISPATCHES = ("padded", "ragged")

MOST_OVERHEAD = 0.02
"""Of fill-in, in padded dispatch."""
MOST_LEDGER = 0.01
"""Part of a step."""

HEADINGS = {
    "world": "ranks",
    "top_k": "k",
    "dispatch": "dispatch",
    "router": "router",
    "gini": "Gini",
    "method": "method",
    "step_ms": "ms",
    "vs_vanilla": "x vanilla",
    "spread": "quartiles",
    "sent_mb": "MB",
    "waited_ms": "waited",
    "filled_ratio": "filled",
    "rectified_ratio": "rectified",
    "dropped_ratio": "dropped",
    "padding_ratio": "padding",
    "unserved_ratio": "unserved",
    "expert_rows_max_over_mean": "busiest",
    "saved_mb": "saved",
}


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """All cases, world by world. Raises RuntimeError where the ranks fail or a method is not what it must be."""
    worlds, top_ks = ((2,), (1,)) if quick else ((2, 4), (1, 2))
    corpus = prepare(BASE.data, progress=False)
    say("training the models whose routers are replayed")
    contest = Contest(
        base=BASE,
        corpus=corpus,
        cases=tuple(Case(router, way, k) for k in top_ks for way in DISPATCHES for router in ROUTERS),
        traces=record(top_ks, corpus),
        rounds=41,
        warmup=2,
        budget_s=50 if quick else 30,
    )
    rows: list[Row] = []
    notes = [
        f"{SEQUENCES * SEQ_LEN} tokens, one thread and a full set of dense weights per rank, fp32, capacity factor "
        f"{CAPACITY_FACTOR:g}; a round is one training step of each method, ratios are medians within rounds",
        "routers are forced: all ranks and steps see the same logits, so ranks differ in the load of the experts they "
        "hold, not in what their tokens lose",
        "per step: MB sent to other ranks, gradients included, over all ranks; ms waited for dispatch and combine, the "
        "slowest rank; busiest: expert rows of a rank, maximum over mean; MB saved by forward for backward, one rank",
        "dropless runs ragged in both kinds of dispatch",
    ]
    for world in worlds:
        say(f"{world} ranks")
        new_rows, new_notes = run_world(contest, world)
        rows += new_rows
        notes += new_notes
    if quick:
        notes.append("quick: left out 4 ranks and top-2")
    return Report(
        name="rectify-speed",
        command=command,
        env=environment(["numpy"]),
        rows=rows,
        goals=goals(rows),
        notes=notes,
        headings=HEADINGS,
    )


def draw(report: Report, path: Path) -> Path | None:
    """Pictures the step times of `report` as PNG; None where that cannot be."""
    return draw_speed(report.rows, path)


def run_world(contest: Contest, world: int) -> tuple[list[Row], list[str]]:
    """Rows and notes of `world` ranks, over a shaped link where this machine can have one."""
    try:
        with shaped_link(world, RATE) as link:
            result = launch(contest, world, link)
        place = f"on hosts of their own (network namespaces) that send at {RATE}"
    except NoLinkError as reason:
        result = launch(contest, world, None)
        place = f"on loopback, where the network costs cores instead of time ({reason})"
    pieces = result["piece_bytes"]
    cut = f"cut into pieces of {pieces} bytes" if pieces else "not cut"
    peak = max(row["peak_resident_bytes"] for row in result["rows"]) / 1e9
    notes = [f"{world} ranks {place}; exchanges {cut}; a rank had up to {peak:.2f} GB, all methods' models at once"]
    cores = environment()["cores"]
    if world > cores:
        notes.append(f"{world} ranks share {cores} cores: the time of each holds work of the others")
    return [_shown(row) for row in result["rows"]], notes


def record(top_ks: Sequence[int], corpus: Path) -> dict[int, Path]:
    """A trace for each top_k, each model trained in a process of its own."""
    with ProcessPoolExecutor(len(top_ks), mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {
            k: pool.submit(
                rectify_trace.recorded,
                rectify_trace.configure(k, EXPERTS, LAYERS, VOCABULARY),
                SEQUENCES * SEQ_LEN,
                corpus,
                FOLDER.absolute(),
            )
            for k in top_ks
        }
        return {k: job.result() for k, job in jobs.items()}


def launch(contest: Contest, world: int, link: Link | None) -> dict[str, Any]:
    """Runs `contest` on `world` ranks: `rows`, and the `piece_bytes` that suit the link.

    Raises RuntimeError where the ranks fail; they have said why.
    """
    with tempfile.TemporaryDirectory(prefix="wastenot-rectify-") as folder:
        told, result = Path(folder) / "contest", Path(folder) / "result.json"
        told.write_bytes(pickle.dumps(contest))
        code = run_ranks_on(link, rectify_ranks.__name__, [str(told), str(result)], world)
        if code != 0:
            raise RuntimeError(f"rectify-speed on {world} ranks ended with code {code}; nothing was measured")
        return json.loads(result.read_text(encoding="utf-8"))


def _shown(row: Row) -> Row:
    """`row` with its figures in units for a table."""
    return {
        **row,
        "step_ms": 1e3 * row["step_seconds"],
        "spread": "-".join(f"{value:.2f}" for value in row["vs_vanilla_quartiles"] or []),
        "waited_ms": 1e3 * row["waited_seconds"],
        "sent_mb": row["sent_bytes"] / 1e6,
        "saved_mb": row["saved_bytes"] / 1e6,
    }


def goals(rows: Sequence[Row]) -> list[Goal]:
    """The bars, and what is reported without one."""
    found: list[Goal] = []
    for world, k in dict.fromkeys((row["world"], row["top_k"]) for row in rows):
        here = [row for row in rows if (row["world"], row["top_k"]) == (world, k)]
        where = f"{world} ranks, top-{k}"
        padded = [row for row in here if row["dispatch"] == "padded"]
        overhead = statistics.median(row["vs_vanilla"] - 1 for row in padded if row["method"] == "FR")
        found.append(at_most(f"{where}: step time added by FR, padded, median over routers", overhead, MOST_OVERHEAD))
        for dispatch in DISPATCHES:
            ratios = [r["vs_dropless"] for r in here if (r["dispatch"], r["method"]) == (dispatch, "both")]
            metric = f"{where}: step time of both relative to dropless, {dispatch}, median over routers"
            found.append(_reported(metric, statistics.median(ratios)))
        padding = {m: sum(row["slots"]["padding"] for row in padded if row["method"] == m) for m in ("vanilla", "FR")}
        taken = 1 - padding["FR"] / padding["vanilla"] if padding["vanilla"] else None
        found.append(_reported(f"{where}: part of the padded slots that FR fills", taken))
    sent = {(r["world"], r["top_k"], r["dispatch"], r["router"], r["method"]): r["sent_bytes"] for r in rows}
    extra = max(abs(number - sent[*case, "vanilla"]) for (*case, method), number in sent.items() if method == "IR")
    found.append(at_most("bytes that IR sends beyond vanilla, any case", extra, 0))
    ledger = max(row["ledger_part"] for row in rows)
    found.append(at_most("part of a step that the ledger takes, largest of all rows", ledger, MOST_LEDGER))
    return found


def _reported(metric: str, value: float | None) -> Goal:
    return Goal(metric=metric, value=value, goal="reported", met=value is not None)
