"""What the `rectify-speed` benchmark compares, and what must hold before a figure of it means anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...launch.config import TrainConfig
from ...moe.config import EmulateConfig, RouterConfig
from .rectify_methods import DisagreementError, Method, rectify_of

CAPACITY_FACTOR = 1.0


@dataclass(frozen=True)
class Case:
    """Where the methods are compared."""

    router: Literal["uniform", "skewed", "bursty", "replay"]
    dispatch: Literal["padded", "ragged"]
    top_k: int

    def __str__(self) -> str:
        return f"{self.router}, {self.dispatch}, top-{self.top_k}"


@dataclass(frozen=True)
class Contest:
    """All that the ranks of one launch are told."""

    base: TrainConfig
    """Of one rank: `train.batch` sequences are its share. Router and layout are each method's own."""
    corpus: Path
    """Prepared folder."""
    cases: tuple[Case, ...]
    traces: Mapping[int, Path]
    """Recorded logits by top_k, for `replay`."""
    rounds: int
    warmup: int
    budget_s: float
    """Of the steps of one case: on a slow machine there are fewer rounds."""


def configure(contest: Contest, case: Case, method: Method, world: int, emulated: bool = False) -> TrainConfig:
    """The training of `method` on `world` ranks that share the experts, or in one process that stands for them."""
    base, dropless = contest.base, method == "dropless"
    assert base.model.moe is not None
    router = RouterConfig(
        kind=case.router,
        trace=str(contest.traces[case.top_k]) if case.router == "replay" else None,
        top_k=case.top_k,
        capacity_factor=None if dropless else CAPACITY_FACTOR,
        balance_loss=0.0,
        rectify=rectify_of(method),
        emulate=EmulateConfig(sources=world, owners=world) if emulated else None,
    )
    # Without a capacity there is nothing to pad to.
    moe = replace(base.model.moe, dispatch="ragged" if dropless or emulated else case.dispatch)
    return replace(
        base,
        model=replace(base.model, moe=moe),
        router=router,
        parallel=replace(base.parallel, data=1 if emulated else world, expert=1 if emulated else world),
        train=replace(base.train, batch=base.train.batch * world),
    )


def check_bytes(case: Case, sent: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Raises DisagreementError where a method that must cost no communication sends other bytes than vanilla.

    sent: per method and rank, the bytes of every step.
    """
    free = ("IR",) if case.dispatch == "ragged" else ("IR", "FR", "both")
    for method in free:
        for rank, (steps, vanilla) in enumerate(zip(sent[method], sent["vanilla"], strict=True)):
            if {*steps} != {*vanilla} or len({*steps}) != 1:
                theirs, ours = (", ".join(map(str, sorted({*values}))) for values in (vanilla, steps))
                raise DisagreementError(f"{case}, {method}: rank {rank} sent {ours} bytes a step, vanilla {theirs}")
