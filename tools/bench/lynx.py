"""Benchmark `lynx`: recomputation under communication against what others do, on real ranks over real links.

All policies train side by side in the same ranks and take turns, over links from 100 Mbit/s to 10 Gbit/s, at three
budgets of memory. `full` is torch.utils.checkpoint around blocks, which sends again what forward sent, as Megatron-LM
does; `full, kept` keeps what collectives brought; `selective` is torch's selective checkpointing; `lynx-heu` and
`lynx-opt` are planned for the budget from the run's own measurements. So it is seen where each gain comes from.
"""

from __future__ import annotations

import itertools
import json
import pickle
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...launch.config import DataConfig, LogConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from ...launch.errors import UserError
from ...moe.config import ModelConfig, MoEConfig, RouterConfig
from ...parallel.mesh import Mesh
from . import lynx_ranks
from .interleave import Timings
from .link import Link, NoLinkError, run_ranks_on, shaped_link
from .lynx_contest import SOLVERS, Contest, compared, timed
from .lynx_pictures import draw_step_times, draw_trace
from .report import Goal, Report, Row, at_least, at_most, environment

RATES = ("100mbit", "300mbit", "1gbit", "3gbit", "10gbit")
QUICK_RATES = ("300mbit", "1gbit")
SHOWN = "1gbit"
"""Link of the pictured step."""
FAST = "10gbit"
"""Link under which gradients are compared."""
LAYERS, EXPERTS, SEQ_LEN, SEQUENCES, VOCABULARY = 4, 8, 128, 6, 512
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
    router=RouterConfig(top_k=2),
    # So small that all policies, of which some take more turns, keep the same routing.
    optimizer=OptimizerConfig(lr=1e-9),
    schedule=ScheduleConfig(kind="constant"),
    data=DataConfig(seq_len=SEQ_LEN),
    train=LoopConfig(batch=SEQUENCES),
    log=LogConfig(dir="unused"),
)
COMPARED = replace(BASE, optimizer=OptimizerConfig(lr=1e-3))
"""Weights that move."""
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
FEWEST_ROUNDS = 30

LEAST_GAIN = 1.3
"""Over full, somewhere."""
LEAST_OF_BOUND = 0.9
LEAST_OF_BEST = 0.98
LEAST_HIDDEN = 0.9
ROOM = 1.25
"""A link's windows are long enough where they last so many times what is recomputed (a choice of ours)."""
MEDIAN_ERROR, LARGEST_ERROR = 0.1, 0.25
DIFFERENT = 0.05
"""Step times that far apart must be ranked right."""

HEADINGS = {
    "rate": "link",
    "budget": "budget",
    "policy": "policy",
    "step_ms": "ms",
    "spread": "quartiles",
    "predicted_ms": "predicted",
    "peak_mb": "peak MB",
    "budget_mb": "of MB",
    "fits": "fits",
    "hidden_ms": "hidden",
    "exposed_ms": "exposed",
    "waited_ms": "waited",
    "vs_full": "x full",
    "vs_kept": "x full, kept",
    "bound": "bound",
    "vs_best": "x best",
    "vs_best_lower": "95 % above",
}


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Compares gradients, then measures link by link.

    Raises UserError where this machine has no such links, and RuntimeError where the ranks fail or gradients differ.
    """
    rates, rounds = (QUICK_RATES, 9) if quick else (RATES, FEWEST_ROUNDS + 1)
    contest = Contest(base=BASE, parts=(0.25,) if quick else (0.25, 0.5), rounds=rounds)
    same = [
        f"{ranks} rank{'s' * (ranks > 1)} in {precision}"
        for ranks, precision in itertools.product((2,) if quick else (1, 2, 4), PRECISIONS)
        if _compare(ranks, precision, 3 if quick else 20, say)
    ]
    rows: list[Row] = []
    pieces: list[str] = []
    unfit: list[str] = []
    for rate in rates:
        found = _on(2, rate, partial(timed, contest), say)
        new = completed(found, rate)
        rows += new
        pieces.append(f"{rate}: {found['piece_bytes'] or 'whole'}")
        planned = {(row["policy"], row["budget"]) for row in new}
        unfit += [
            f"{p}, {b} at {rate}" for p, b in itertools.product(SOLVERS, found["budgets"]) if (p, b) not in planned
        ]
        say(f"{rate}: " + ", ".join(f"{r['policy']} {r['budget'] or ''} {r['step_ms']:.0f} ms" for r in new))
    notes = [
        f"2 ranks on hosts of their own (network namespaces), a thread each, {SEQUENCES * SEQ_LEN} tokens a rank, "
        f"{LAYERS} layers of {EXPERTS} experts, top-2, fp32; a round is one training step of each policy",
        "budgets: a rank's weights, gradients, AdamW's state and activations; the per cents are of the activations "
        "between everything dropped and nothing, as measured; one more is what selective takes",
        "ms: median over rounds of the slowest rank; hidden, exposed, waited: medians of a step, means over ranks; x: "
        "medians of ratios within rounds",
        "bound: what full, kept would gain if its recomputation ran under its backward windows as far as they last",
        f"gradients of all policies are the same bits as none's, {3 if quick else 20} steps: {', '.join(same)}",
        f"exchanges in pieces of bytes: {', '.join(pieces)}",
    ]
    if unfit:
        notes.append(f"no plan was found to fit: {'; '.join(unfit)}")
    if quick:
        notes.append(f"quick: left out {len(RATES) - len(rates)} links, a budget, 1 and 4 ranks, and most rounds")
    return Report(
        name="lynx", command=command, env=environment(), rows=rows, goals=goals(rows), notes=notes, headings=HEADINGS
    )


def draw(report: Report, path: Path) -> Path | None:
    """Pictures step times over bandwidth, and beside it a step of one rank, `-trace`; None where that cannot be."""
    draw_trace(report.rows, path.with_name(f"{path.stem}-trace{path.suffix}"))
    return draw_step_times(report.rows, path)


def _compare(ranks: int, precision: Precision, steps: int, say: Callable[[str], None]) -> bool:
    config = replace(COMPARED, train=replace(COMPARED.train, precision=precision, batch=2))
    found = _on(ranks, FAST, partial(compared, config, steps), say)
    if not all(found["dropped"].values()):
        raise RuntimeError(f"lynx on {ranks} ranks, {precision}: a plan recomputes nothing, so nothing was compared")
    say(f"{ranks} ranks, {precision}: {found['tensors']} gradients are the same; dropped: {found['dropped']}")
    return True


def _on(ranks: int, rate: str, job: Callable[[Mesh], Any], say: Callable[[str], None]) -> dict[str, Any]:
    say(f"{ranks} ranks at {rate}")
    try:
        with shaped_link(ranks, rate) as link:
            return launch(job, ranks, link)
    except NoLinkError as reason:
        raise UserError(f"bench lynx: {reason}; it needs Linux, and root, to make links of a given bandwidth") from None


def launch(job: Callable[[Mesh], Any], ranks: int, link: Link | None) -> dict[str, Any]:
    """What `job` returns on rank 0. Raises RuntimeError where the ranks fail; they have said why."""
    with tempfile.TemporaryDirectory(prefix="wastenot-lynx-") as folder:
        told, result = Path(folder) / "job", Path(folder) / "result.json"
        told.write_bytes(pickle.dumps(job))
        code = run_ranks_on(link, lynx_ranks.__name__, [str(told), str(result)], ranks)
        if code != 0:
            raise RuntimeError(f"lynx on {ranks} ranks ended with code {code}; nothing was measured")
        return json.loads(result.read_text(encoding="utf-8"))


def completed(found: Mapping[str, Any], rate: str) -> list[Row]:
    """Rows of one link, with what only comparison tells, and figures in units for a table."""
    timings = Timings(found["seconds"])
    by_policy = {row["policy"]: row for row in found["rows"] if row["budget"] is None}
    kept, window_s = by_policy["full, kept"], found["windows"]["backward"]
    gain = kept["step_seconds"] / (kept["step_seconds"] - min(kept["exposed_seconds"], window_s))
    rows: list[Row] = []
    for row in found["rows"]:
        turn = row["turn"]
        more: dict[str, Any] = {
            "rate": rate,
            "window_seconds": window_s,
            "step_ms": 1e3 * row["step_seconds"],
            "spread": "-".join(f"{1e3 * value:.0f}" for value in row["quartiles"]),
            "waited_ms": 1e3 * row["waited_seconds"],
            "peak_mb": row["peak_bytes"] / 1e6,
            "vs_full": timings.ratio(turn, "full"),
            "vs_kept": timings.ratio(turn, "full, kept"),
            "rounds": len(timings.seconds[turn]),
        }
        if row["predicted_seconds"] is not None:
            more["predicted_ms"] = 1e3 * row["predicted_seconds"]
        if row["policy"] in (*SOLVERS, "full, kept"):
            more |= {f"{what}_ms": 1e3 * row[f"{what}_seconds"] for what in ("hidden", "exposed")}
        if row["budget"] is None:
            room = [name for name, size in found["budgets"].items() if row["peak_bytes"] <= size]
            more["fits"] = ", ".join(room) or "nowhere"
        if row["policy"] in SOLVERS:
            fits = [each for each in by_policy.values() if each["peak_bytes"] <= row["budget_bytes"]]
            more |= {"bound": gain, "budget_mb": row["budget_bytes"] / 1e6}
            # The least budget holds what keeps nothing: some other policy always fits.
            best = min(fits, key=lambda each: each["step_seconds"])["policy"]
            more |= {
                "best_other": best,
                "vs_best": timings.ratio(turn, best),
                "vs_best_lower": timings.ratio_lower(turn, best),
                "vs_selective": timings.ratio(turn, "selective"),
            }
        if (rate, row["policy"], row["budget"]) == (SHOWN, "lynx-heu", next(iter(found["budgets"]))):
            more["trace"] = found["trace"]
        rows.append({**row, **more})
    return rows


def goals(rows: Sequence[Row]) -> list[Goal]:
    """The bars."""
    planned = [row for row in rows if row["policy"] in SOLVERS]
    bound = min((row["vs_kept"] / row["bound"] for row in planned), default=None)
    beside_best = [row["vs_best_lower"] for row in planned]
    roomy = [
        row["hidden_seconds"] / recomputed
        for row in planned
        if 0 < (recomputed := row["hidden_seconds"] + row["exposed_seconds"]) <= row["window_seconds"] / ROOM
    ]
    beside_selective = [row["vs_selective"] for row in planned if row["budget"] == "selective's"]
    errors = [abs(r["predicted_seconds"] / r["step_seconds"] - 1) for r in rows if r["predicted_seconds"] is not None]
    return [
        at_least("lynx over full, largest of the sweep", max(r["vs_full"] for r in planned), LEAST_GAIN),
        at_least("lynx over full, kept, as a part of the bound, least", bound, LEAST_OF_BOUND),
        at_least(
            "lynx over the best other policy that fits, lower 95 % bound, least",
            None if None in beside_best else min(beside_best),
            LEAST_OF_BEST,
        ),
        at_least(
            f"part of recomputation hidden where windows last {ROOM:g} times as long, least",
            min(roomy, default=None),
            LEAST_HIDDEN,
        ),
        at_least("lynx over selective at its memory, least", min(beside_selective, default=None), 1.0),
        at_most("predicted against measured step time, median error", statistics.median(errors), MEDIAN_ERROR),
        at_most("the same, largest error", max(errors), LARGEST_ERROR),
        at_most(f"pairs of policies {DIFFERENT:.0%} apart that are ranked wrong", len(misranked(rows)), 0),
        at_most("peak over budget, lynx, largest", max(r["peak_bytes"] / r["budget_bytes"] for r in planned), 1.0),
    ]


def misranked(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Link and two policies, of which the one that is more than `DIFFERENT` faster was predicted to be slower."""
    found: list[tuple[str, str, str]] = []
    for rate in dict.fromkeys(row["rate"] for row in rows):
        here = {row["turn"]: row for row in rows if row["rate"] == rate and row["predicted_seconds"] is not None}
        for fast, slow in itertools.permutations(here.values(), 2):
            is_apart = slow["step_seconds"] > (1 + DIFFERENT) * fast["step_seconds"]
            if is_apart and slow["predicted_seconds"] < fast["predicted_seconds"]:
                found.append((rate, fast["turn"], slow["turn"]))
    return found
