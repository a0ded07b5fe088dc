"""What the folder of a compression says; any part of it may be missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ....launch.errors import UserError
from ....moe.compress.plan import DropPlan, read_plan
from ....moe.compress.profile import COSTS, Profile, read_profile
from ...report.runs import finite, read_object

PROFILE, PLAN, STEPS, QUALITY, VERIFY = "profile", "plan.yaml", "steps.json", "quality.json", "verify.json"
WHOLE = "whole"
"""The row of quality that all others are compared with."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Row:
    """One stage's model: the whole one, as the plan was applied, recovered, exported. None: not measured."""

    name: str
    parameters: int | None
    bytes: int | None
    loss: float | None
    """Nats per token, on held-out text."""
    accuracy: float | None
    """Part of the tokens that were the likeliest."""
    kl: float | None
    """Nats per token from the whole model."""
    prefill: float | None
    """Tokens per second while a prompt is read ..."""
    decode: float | None
    """... and while an answer is written."""
    seconds: float | None
    """Of the stage that made it."""
    peak_bytes: int | None
    """Memory of that stage."""


@dataclass(frozen=True)
class Balance:
    """Load of the busiest of the ranks that share a layer's experts, over the mean of them."""

    layer: int
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Quality:
    """What was measured of the models; empty where nothing was."""

    checkpoint: str = ""
    text: str = ""
    """Name of the held-out text."""
    unigram_accuracy: float | None = None
    """What always guessing the commonest token reaches on it."""
    rows: tuple[Row, ...] = ()
    balance: tuple[Balance, ...] = ()
    ranks: int | None = None
    stability: tuple[tuple[int, float], ...] = ()
    """Tokens of calibration text, and the Jaccard index of what is kept by them with what is kept by all."""
    not_measured: tuple[str, ...] = ()

    @property
    def whole(self) -> Row | None:
        return next((row for row in self.rows if row.name == WHOLE), None)

    @property
    def last(self) -> Row | None:
        """The compressed model as it left the last stage that was judged."""
        return next((row for row in reversed(self.rows) if row.name != WHOLE), None)

    def kept(self, row: Row) -> float | None:
        """Part that `row` keeps of what the whole model knows beyond the commonest token."""
        whole, floor = self.whole, self.unigram_accuracy
        if whole is None or whole.accuracy is None or row.accuracy is None or floor is None or whole.accuracy == floor:
            return None
        return (row.accuracy - floor) / (whole.accuracy - floor)

    def ratio(self, row: Row, what: Callable[[Row], float | None]) -> float | None:
        """`what` of `row` over that of the whole model."""
        here, there = what(row), None if self.whole is None else what(self.whole)
        return None if here is None or not there else here / there


@dataclass(frozen=True)
class SearchStep:
    """One plan on the way to the budget."""

    hash: str
    cost: float
    """In the target's unit."""
    tried: int
    kl: float
    loss: float | None


@dataclass(frozen=True)
class Contender:
    """One compression of a benchmark."""

    case: str
    method: str
    bytes: int | None
    loss: float | None
    accuracy: float | None
    kept: float | None
    prefill_ratio: float | None
    decode_ratio: float | None


@dataclass(frozen=True)
class Compression:
    """A folder of a compression as it stands on the disk."""

    name: str
    profile: Profile | None
    costs: Mapping[str, Any]
    """Of the profile: seconds, bytes and the layout; empty where they are missing."""
    plan: DropPlan | None
    plan_text: str
    target: str
    """What the search was to make small; empty without one."""
    steps: tuple[SearchStep, ...]
    quality: Quality
    verify: Mapping[str, Any]
    """What verification found; empty without one."""
    bench: tuple[Contender, ...]


def read_compression(folder: Path, bench: Path | None = None) -> Compression:
    """What lies in `folder`, and in the benchmark's file where one is given.

    Raises UserError where `folder` holds no part of a compression, or a part is damaged.
    """
    parts = [name for name in (PROFILE, PLAN, STEPS, QUALITY, VERIFY) if (folder / name).exists()]
    if not parts:
        raise UserError(
            f"{folder} is no compression: it has none of {PROFILE}/, {PLAN} and {QUALITY}; give a folder that "
            "`wastenot compress auto` wrote"
        )
    profile, plan, plan_text = None, None, ""
    try:
        if PROFILE in parts:
            profile = read_profile(folder / PROFILE)
        if PLAN in parts:
            plan = read_plan(folder / PLAN)
            plan_text = (folder / PLAN).read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(str(error)) from error
    target, steps = _read(folder / STEPS, _search)
    return Compression(
        name=folder.resolve().name,
        profile=profile,
        costs=read_object(folder / PROFILE / COSTS),
        plan=plan,
        plan_text=plan_text,
        target=target,
        steps=steps,
        quality=_read(folder / QUALITY, _quality),
        verify=read_object(folder / VERIFY),
        bench=() if bench is None else _contenders(bench),
    )


def _read(path: Path, make: Callable[[Mapping[str, Any]], _Item]) -> _Item:
    """What `make` reads in the JSON object at `path`. Raises UserError where that holds something else."""
    found = read_object(path)
    try:
        return make(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: is not what `wastenot compress` writes ({error!r}); remove it to have a page without it"
        ) from error


def _search(found: Mapping[str, Any]) -> tuple[str, tuple[SearchStep, ...]]:
    steps = [
        SearchStep(str(each["hash"]), float(each["cost"]), int(each["tried"]), float(each["kl"]), finite(each["loss"]))
        for each in found.get("steps", [])
    ]
    return str(found.get("target") or ""), tuple(steps)


def _quality(found: Mapping[str, Any]) -> Quality:
    return Quality(
        checkpoint=str(found.get("checkpoint", "")),
        text=str(found.get("text", "")),
        unigram_accuracy=finite(found.get("unigram_accuracy")),
        rows=tuple(map(_row, found.get("rows", []))),
        balance=tuple(
            Balance(int(each["layer"]), finite(each.get("before")), finite(each.get("after")))
            for each in found.get("balance") or []
        ),
        ranks=_whole_number(found.get("ranks")),
        stability=tuple((int(each["tokens"]), float(each["jaccard"])) for each in found.get("stability") or []),
        not_measured=tuple(map(str, found.get("not_measured") or [])),
    )


def _row(found: Mapping[str, Any]) -> Row:
    return Row(
        name=str(found["name"]),
        parameters=_whole_number(found.get("parameters")),
        bytes=_whole_number(found.get("bytes")),
        loss=finite(found.get("loss")),
        accuracy=finite(found.get("accuracy")),
        kl=finite(found.get("kl")),
        prefill=finite(found.get("prefill_tokens_per_second")),
        decode=finite(found.get("decode_tokens_per_second")),
        seconds=finite(found.get("seconds")),
        peak_bytes=_whole_number(found.get("peak_bytes")),
    )


def _contenders(path: Path) -> tuple[Contender, ...]:
    """The rows of a benchmark's file: its `rows`, or the file where that is a list."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows: Sequence[Mapping[str, Any]] = found["rows"] if isinstance(found, Mapping) else found
        return tuple(map(_contender, rows))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: holds no rows of a benchmark ({error!r}); give what `wastenot bench compress --json` prints"
        ) from error


def _contender(found: Mapping[str, Any]) -> Contender:
    return Contender(
        case=str(found["case"]),
        # The whole model has no method.
        method=str(found["method"]) or str(found["case"]),
        bytes=_whole_number(found.get("bytes")),
        loss=finite(found.get("loss")),
        accuracy=finite(found.get("accuracy")),
        kept=finite(found.get("kept")),
        prefill_ratio=finite(found.get("prefill_ratio")),
        decode_ratio=finite(found.get("decode_ratio")),
    )


def _whole_number(value: Any) -> int | None:
    return None if (number := finite(value)) is None else int(number)
