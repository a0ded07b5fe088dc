"""Benchmark `adapprox-memory`: bytes of Adapprox's state, allocated by real steps on the paper's parameter shapes.

The published percentages (arXiv 2403.14958, abstract) are the two ends of the range of ranks, not averages of a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...launch.peak_memory import peak_bytes
from ...parallel.optim import Adapprox
from .adapprox_check import check
from .adapprox_shapes import MODELS, Rank, Shape, Shapes, expected_bytes
from .machine import use_the_machine
from .report import Goal, Report, Row, at_most, environment

PUBLISHED: Mapping[tuple[str, Rank, str], float] = {
    ("GPT-2 117M", "k_max", "fp32"): 34.5,
    ("GPT-2 117M", "k = 1", "fp32"): 49.9,
    ("GPT-2 117M", "k_max", "none"): 84.5,
    ("GPT-2 117M", "k = 1", "none"): 99.9,
    ("GPT-2 345M", "k_max", "fp32"): 33.8,
    ("GPT-2 345M", "k = 1", "fp32"): 49.9,
    ("GPT-2 345M", "k_max", "none"): 83.8,
    ("GPT-2 345M", "k = 1", "none"): 99.9,
}
"""Percent of AdamW's state that is saved, by model, rank and first moment."""

LARGEST_PART = 0.68
"""Of AdamW's state at k_max with a first moment in fp32: what the project allows."""

HEADINGS = {
    "model": "model",
    "optimizer": "optimizer",
    "rank": "rank",
    "momentum": "first moment",
    "state_mib": "state, MiB",
    "saved_percent": "saved, %",
    "published_percent": "published, %",
    "bytes_per_parameter": "bytes/parameter",
    "unequal": "not the formula's",
    "transient_mib": "step, MiB",
}


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What steps of one parameter took."""

    state: int
    """Every storage that the optimizer keeps, counters too."""
    transient: int
    """Most that lived at once during a second step, beyond what lived before it."""


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Steps one parameter of every shape with every optimizer; raises where Adapprox's steps are wrong."""
    check()
    use_the_machine()
    rows: list[Row] = []
    for model, shapes in MODELS.items():
        if not (quick and model == "GPT-2 345M"):
            rows += measure(model, shapes, say, every_momentum=model != "GPT-2 345M" and not quick)
    notes = [
        "one parameter of each shape was stepped and is counted as often as the model has it; its gradient is random",
        "k = 1: max_rank=1; k_max: max_rank=0.25 with rank_threshold=0, which no factors reach",
        "saved: of the state of torch.optim.AdamW after a step on the same shapes; all bytes count, steps, ranks and "
        "errors too",
        "step: the most that one step holds beside state, weights and gradients, of the shape where that is most; "
        "others are stepped before or after it. A step that tries several ranks holds one set of factors more",
    ]
    if quick:
        notes.append("quick: left out are GPT-2 345M, and first moments in bf16 and int8")
    return Report(
        name="adapprox-memory",
        command=command,
        env=environment(["numpy"]),
        rows=rows,
        goals=goals(rows),
        notes=notes,
        headings=HEADINGS,
    )


def measure(model: str, shapes: Shapes, say: Callable[[str], None], every_momentum: bool = True) -> list[Row]:
    """Rows of one model: AdamW, and Adapprox at both ranks with every first moment, or with one in fp32 and none."""
    momenta = ("fp32", "bf16", "int8", "none") if every_momentum else ("fp32", "none")
    cases: list[tuple[Rank, str] | None] = [None, *((r, m) for r in ("k = 1", "k_max") for m in momenta)]
    found: dict[tuple[Rank, str] | None, dict[Shape, Bytes]] = {case: {} for case in cases}
    for number, shape in enumerate(shapes, 1):
        say(f"{model}: {' x '.join(map(str, shape))}, {number} of {len(shapes)} shapes")
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        for case in cases:
            found[case][shape] = bytes_of(parameter, case)
    adamw = sum(found[None][shape].state * count for shape, count in shapes.items())
    return [_row(model, shapes, case, found[case], adamw) for case in cases]


def bytes_of(parameter: nn.Parameter, case: tuple[Rank, str] | None) -> Bytes:
    """Two steps of AdamW (`case` None), or of Adapprox at a rank with a first moment."""
    if case is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([parameter])
    else:
        rank, momentum = case
        limit: dict[str, Any] = {"max_rank": 1} if rank == "k = 1" else {"max_rank": 0.25, "rank_threshold": 0.0}
        # One round: where the iteration ends is of no interest here.
        optimizer = Adapprox([parameter], momentum=momentum, rounds=1, **limit)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*factors of the largest rank", category=UserWarning)
        optimizer.step()
        state = storage_bytes(optimizer.state[parameter].values())
        return Bytes(state=state, transient=peak_bytes(optimizer.step))


def storage_bytes(values: Iterable[Any]) -> int:
    """Bytes of the storages behind all tensors of `values`, each once."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _row(
    model: str, shapes: Shapes, case: tuple[Rank, str] | None, found: Mapping[Shape, Bytes], adamw: int
) -> dict[str, Any]:
    state = sum(found[shape].state * count for shape, count in shapes.items())
    numbers = sum(torch.Size(shape).numel() * count for shape, count in shapes.items())
    row: dict[str, Any] = {
        "model": model,
        "optimizer": "AdamW" if case is None else "Adapprox",
        "rank": case and case[0],
        "momentum": case[1] if case else "fp32",
        "state_bytes": state,
        "state_mib": state / 2**20,
        "of_adamw": state / adamw,
        "saved_percent": 100 * (1 - state / adamw),
        "bytes_per_parameter": state / numbers,
        "transient_bytes": max(b.transient for b in found.values()),
    }
    row["transient_mib"] = row["transient_bytes"] / 2**20
    if case is not None:
        row["published_percent"] = PUBLISHED.get((model, *case))
        wrong = [shape for shape, b in found.items() if b.state != expected_bytes(shape, *case)]
        row["unequal"] = sum(shapes[shape] for shape in wrong)
    return row


def goals(rows: list[Row]) -> list[Goal]:
    """The published percentages to the printed digit, the formula at every parameter, and the project's own bound."""
    found: list[Goal] = []
    ours = [row for row in rows if row["optimizer"] == "Adapprox"]
    for row in ours:
        published, saved = row["published_percent"], row["saved_percent"]
        if published is not None:
            moment = "a first moment" if row["momentum"] == "fp32" else "none"
            metric = f"{row['model']}, {row['rank']}, {moment}: % of AdamW's state saved"
            found.append(
                Goal(metric=metric, value=saved, goal=f"= {published:.1f}", met=f"{saved:.1f}" == f"{published:.1f}")
            )
    found.append(at_most("parameters whose state is not the formula's", sum(row["unequal"] for row in ours), 0))
    for row in ours:
        if (row["rank"], row["momentum"]) == ("k_max", "fp32"):
            found.append(at_most(f"{row['model']}, k_max: state / AdamW's", row["of_adamw"], LARGEST_PART))
    return found
