"""What a person wants to know of a run first, in a handful of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

from ...moe.accounts import slot_ratios
from ...moe.config_size import count_parameters
from .accounts import Account, account_of
from .runs import Run, finite, finite_values, read_runs


@dataclass(frozen=True)
class Headline:
    """Figures of one run; None where it did not write them down."""

    val_bits_per_byte: float | None
    """Of the last evaluation."""
    val_loss: float | None
    order5_bits_per_byte: float | None
    """What an n-gram model of five preceding bytes reaches on the same text."""
    tokens_per_second: float | None
    """Median over the logged intervals."""
    kept_ratio: float | None
    """This ratio, and the next three, over the whole run: parts of all choices."""
    filled_ratio: float | None
    rectified_ratio: float | None
    dropped_ratio: float | None
    padding_ratio: float | None
    """Part of all slots."""
    unserved_ratio: float | None
    """Part of all tokens, mean over the layers."""
    optimizer_bytes_per_parameter: float | None
    """Of the optimizer's state, last known."""
    optimizer_part_of_adamw: float | None
    parameters: int | None
    active_parameters: int | None
    """Those that one token's forward pass uses."""
    world: int | None
    steps: int
    planned_steps: int | None
    training_seconds: float | None
    peak_memory_bytes: int | None
    skipped_steps: int | None


@dataclass(frozen=True)
class Entry:
    """A run with its account and its figures: what a page is made of."""

    run: Run
    account: Account | None
    headline: Headline

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.run.name, "path": str(self.run.path), **asdict(self.headline)}


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """Entries of the runs in the folders `paths`; UserError where one is no run."""
    return [Entry(run, account := account_of(run), headline_of(run, account)) for run in read_runs(paths)]


def headline_of(run: Run, account: Account | None) -> Headline:
    """The figures of `run`; ratios come from its `account`, or of an older run from its metrics."""
    summary, last = run.summary, run.evaluations[-1] if run.evaluations else {}
    parameters = _parameters(run)
    ratios: dict[str, float] = {}
    if account is not None and account.num_layers:
        ratios = slot_ratios(account.slots, account.tokens)
    elif known := finite_values(run.lines, "dropped_ratio"):
        ratios["dropped_ratio"] = sum(known) / len(known)
    speeds = finite_values(run.lines, "tokens_per_second")
    return Headline(
        val_bits_per_byte=finite(last.get("val_bits_per_byte", summary.get("val_bits_per_byte"))),
        val_loss=finite(last.get("val_loss", summary.get("val_loss"))),
        order5_bits_per_byte=finite(summary.get("order5_bits_per_byte", last.get("order5_bits_per_byte"))),
        tokens_per_second=median_high(speeds) if speeds else None,
        kept_ratio=ratios.get("kept_ratio"),
        filled_ratio=ratios.get("filled_ratio"),
        rectified_ratio=ratios.get("rectified_ratio"),
        dropped_ratio=ratios.get("dropped_ratio"),
        padding_ratio=ratios.get("padding_ratio"),
        unserved_ratio=ratios.get("unserved_ratio"),
        optimizer_bytes_per_parameter=_last(run, "optimizer_bytes_per_parameter"),
        optimizer_part_of_adamw=_last(run, "optimizer_part_of_adamw"),
        parameters=summary.get("parameters", parameters.get("total")),
        active_parameters=parameters.get("active"),
        world=run.world,
        steps=run.steps,
        planned_steps=run.get("train.steps"),
        training_seconds=finite(summary.get("training_seconds")),
        peak_memory_bytes=summary.get("peak_memory_bytes"),
        skipped_steps=run.lines[-1].get("skipped") if run.lines else None,
    )


def _last(run: Run, name: str) -> float | None:
    """The last known value of `name` among the lines of metrics."""
    known = finite_values(run.lines, name)
    return known[-1] if known else None


def _parameters(run: Run) -> Mapping[str, int]:
    """Counts from the configuration, where this version can read it and it tells the size of the vocabulary."""
    if run.parsed is None or not run.parsed.model.vocab_size:
        return {}
    return count_parameters(run.parsed.model, run.parsed.router)
