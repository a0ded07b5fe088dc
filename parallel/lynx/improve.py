"""Single moves that make an assignment better: the end of HEU-MIX, and of OPT's rounding."""

from __future__ import annotations

from .draft import Draft, Trial
from .problem import Source, Stage

_LEAST = 1e-12
"""Seconds that are nothing."""


def windows_for(stage: Stage, number: int) -> list[int]:
    """Windows that may serve a layer: before it in the backward and in it, then stalls and forward windows.

    Those come first in which bytes wait for the shortest time. Forward windows are the layer's own; where it has none,
    and for the last layer, whose outputs are needed first, they are all.
    """
    near = [at for layer in (number + 1, number) for at in stage.windows.get((layer, True), ())]
    own = stage.windows.get((number, False), ())
    if not own or number + 1 == len(stage.layers):
        own = [at for layer in range(len(stage.layers)) for at in stage.windows.get((layer, False), ())]
    far = [*own, *stage.windows.get((-1, False), ())]
    return near[::-1] + far[::-1]


def improve(draft: Draft, *, tries: int) -> None:
    """Moves outputs, one by one, as long as something gets better within the budget.

    First kept outputs into windows with room, which frees bytes and exposes nothing; then what is exposed into windows
    with room, or to be kept, which takes bytes. `tries`: how many moves are weighed at most.
    """
    windows = [windows_for(draft.stage, number) for number in range(len(draft.stage.layers))]
    has_moved = True
    while has_moved and tries > 0 and draft.exposed > _LEAST:
        has_moved = False
        for saves in (True, False):
            for number, i, to in _moves(draft, windows, saves=saves):
                if tries <= 0:
                    return
                trial = draft.moved(number, i, to)
                if trial is None:
                    continue
                tries -= 1
                if trial.peak <= draft.stage.budget and _is_better(trial, saves=saves):
                    draft.take(trial)
                    has_moved = True


def _is_better(trial: Trial, *, saves: bool) -> bool:
    return trial.seconds < -_LEAST or (saves and trial.seconds < _LEAST and trial.lasting < 0)


def _moves(draft: Draft, windows: list[list[int]], *, saves: bool) -> list[tuple[int, int, Source]]:
    """By layer, operator and new source; the most bytes saved or seconds gained for bytes first."""
    found: list[tuple[float, int, int, Source]] = []
    stage = draft.stage
    for number, sources in enumerate(draft.layers):
        for i, operator in enumerate(stage.layers[number].operators):
            source = sources[i]
            size, seconds = operator.bytes, operator.seconds
            if not size or operator.kind == "input" or source == "none":
                continue
            if saves:
                if source == "keep" and operator.kind == "compute":
                    fits = [at for at in windows[number] if draft.left[at] >= seconds]
                    found += [(-stage.in_flight * size, number, i, at) for at in fits]
                continue
            exposed = draft.exposed_of(number, i)
            if exposed <= _LEAST:
                continue
            if operator.kind == "compute":
                for at in windows[number]:
                    if draft.left[at] > _LEAST:
                        gain = exposed - max(0.0, seconds - draft.left[at])
                        lasts = 1.0 if not stage.events[at].backward else 0.1
                        found.append((-gain / size / lasts, number, i, at))
            found.append((-exposed / size / stage.in_flight, number, i, "keep"))
    found.sort(key=lambda each: each[:3])
    return [(number, i, to) for _, number, i, to in found]
