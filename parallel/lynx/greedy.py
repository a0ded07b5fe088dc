"""GREEDY: from everything on demand, moves by (time hidden)/(bytes); every report's baseline (METHODS section 2)."""

from __future__ import annotations

import time

from .draft import Draft
from .evaluate import evaluate
from .extremes import all_on_demand
from .improve import windows_for
from .problem import Source, Stage
from .solution import InfeasibleError, Solution


def solve_greedy(stage: Stage) -> Solution:
    """One pass over all moves, the best first; each is made where it helps and fits.

    Raises `InfeasibleError` where not even the assignment it starts from fits.
    """
    start = time.perf_counter()
    draft = Draft(stage, list(all_on_demand(stage)))
    shrink(draft)
    if draft.peak > stage.budget:
        raise InfeasibleError(draft.peak, stage.budget, is_exact=False)
    for number, i, to in _by_ratio(stage):
        if draft.layers[number][i] == "none":
            continue
        trial = draft.moved(number, i, to)
        if trial is not None and trial.seconds < 0.0 and trial.peak <= stage.budget:
            draft.take(trial)
    return Solution(
        assignment=draft.assignment,
        solver="greedy",
        outcome=evaluate(stage, draft.assignment),
        search_seconds=time.perf_counter() - start,
    )


def shrink(draft: Draft) -> None:
    """Moves outputs one by one, wherever that lowers the peak, until it fits.

    To be kept, for a small one may stand for larger ones; or to windows later than now, and on demand.
    """
    stage, has_moved = draft.stage, True
    while has_moved:
        has_moved = False
        for number, layer in enumerate(stage.layers):
            own = [at for at in windows_for(stage, number) if stage.events[at].backward]
            for i in range(len(layer.operators)):
                for to in ("keep", "demand", *own):
                    if (peak := draft.peak) <= stage.budget:
                        return
                    source = draft.layers[number][i]
                    if source == "none" or source == to or (source == "demand" and to != "keep"):
                        continue
                    trial = draft.moved(number, i, to)
                    if trial is not None and trial.peak < peak:
                        draft.take(trial)
                        has_moved = True


def _by_ratio(stage: Stage) -> list[tuple[int, int, Source]]:
    """Layer, operator and source; the most seconds for bytes first.

    Bytes kept count for all micro-batches in flight; those of backward windows for one layer out of all.
    """
    found: list[tuple[float, int, int, Source]] = []
    for number, layer in enumerate(stage.layers):
        windows = windows_for(stage, number)
        for i, operator in enumerate(layer.operators):
            if operator.kind == "input" or not operator.bytes:
                continue
            found.append((-operator.seconds / operator.bytes / stage.in_flight, number, i, "keep"))
            if operator.kind == "collective":
                continue
            for at in windows:
                event = stage.events[at]
                assert event.window is not None
                hidden = min(operator.seconds, event.window.room)
                found.append((-hidden / operator.bytes * (len(stage.layers) if event.backward else 1), number, i, at))
    found.sort(key=lambda each: each[0])
    return [(number, i, to) for _, number, i, to in found]
