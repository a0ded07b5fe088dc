"""Many ranks, one decision: the pattern behind every checkpoint step, sound when any rank fails.

`torch.distributed`'s object collectives leave the others hanging where one rank raises between them; here a
failure anywhere is an outcome like any other, and every rank learns of it at the same point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .events import Recorder
from .stopwatch import Stopwatch

COLLECTIVE = "checkpoint"
"""What a recorder hears of both ways."""

Local = TypeVar("Local")
Verdict = TypeVar("Verdict")


def consult(
    group: dist.ProcessGroup | None,
    local: Callable[[], Local],
    decide: Callable[[list[Local]], list[Verdict]],
    recorder: Recorder,
) -> Verdict:
    """Calls `local` on every rank, `decide` with all answers on rank 0, and returns each rank its verdict.

    group: its ranks all call this, each from one thread at a time; None is a single process. Answers and
    verdicts are pickled between these live processes (CPU objects of moderate size, never weights).
    recorder: hears of the exchange, but not of its bytes; `local` and `decide` run outside of it.

    Raises the same error on every rank where any `local` or `decide` failed: OSError where the system refused
    (disk full, no permission), ValueError otherwise; the message names the first rank that failed.
    """
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    cause: Exception | None = None
    answer: tuple[Any, _Failure | None]
    try:
        answer = (local(), None)
    except Exception as error:
        cause, answer = error, (None, _failure(error))
    answers: list[Any] = [answer] if group is None else [None] * size
    if group is not None:
        root = dist.get_global_rank(group, 0)
        with _announced(recorder):
            dist.gather_object(answer, answers if rank == 0 else None, dst=root, group=group)

    verdicts: list[tuple[Any, _Failure | None]] = []
    if rank == 0:
        failures = [(where, failed) for where, (_, failed) in enumerate(answers) if failed is not None]
        if failures:
            where, (kind, text) = failures[0]
            verdicts = [(None, (kind, f"rank {where}: {text}" if size > 1 else text))] * size
        else:
            try:
                verdicts = [(verdict, None) for verdict in decide([value for value, _ in answers])]
            except Exception as error:
                cause, verdicts = error, [(None, _failure(error))] * size

    mine: list[Any] = [None]
    if group is None:
        mine = verdicts
    else:
        with _announced(recorder):
            dist.scatter_object_list(mine, verdicts if rank == 0 else None, src=root, group=group)
    verdict, failed = mine[0]
    if failed is not None:
        kind, text = failed
        raise kind(text) from cause
    return verdict


@contextmanager
def _announced(recorder: Recorder) -> Iterator[None]:
    """A collective that fails is never left: whoever explains the failure finds it there."""
    recorder.collective_entered(COLLECTIVE, 0)
    watch = Stopwatch(torch.device("cpu"))
    yield
    recorder.collective_left(COLLECTIVE, watch.stop())


_Failure = tuple[type[Exception], str]


def _failure(error: Exception) -> _Failure:
    if isinstance(error, OSError):
        return OSError, str(error)
    return ValueError, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
