"""Exchanges that make an assignment better: several outputs give up their bytes so that a dearer one can be kept."""

from __future__ import annotations

from .draft import Draft, Trial
from .improve import windows_for
from .problem import Source

_LEAST = 1e-12
"""Seconds that are nothing."""


def exchange(draft: Draft, *, tries: int) -> bool:
    """Keeps what is exposed, the most seconds for bytes first, in place of what costs less; whether that ever helped.

    `tries`: how many moves are weighed at most.
    """
    budget = draft.stage.budget
    has_gained = False
    for number, i in _exposed(draft):
        # What it could be kept instead of, cheapest first; each move below changes what the next is worth.
        before = draft.exposed
        undo: list[Trial] = []
        for other, j, to in [(-1, -1, "keep"), *_releases(draft)]:
            wanted = draft.moved(number, i, "keep")
            if wanted is None or tries <= 0:
                break
            tries -= 1
            spent = draft.exposed - before
            if wanted.seconds + spent >= -_LEAST:
                break
            if wanted.peak <= budget:
                undo.clear()
                draft.take(wanted)
                has_gained = True
                break
            if other < 0 or (other, j) == (number, i):
                continue
            release = draft.moved(other, j, to)
            if release is None:
                continue
            tries -= 1
            if release.peak <= budget and release.lasting < 0 and release.seconds + spent < -wanted.seconds:
                undo.append(draft.weigh(other, draft.layers[other]))
                draft.take(release)
        for trial in reversed(undo):
            draft.take(draft.weigh(trial.number, trial.sources))
        if tries <= 0:
            break
    return has_gained


def _exposed(draft: Draft) -> list[tuple[int, int]]:
    """Layer and operator of what is not hidden, the most seconds for the bytes of keeping it first."""
    found = []
    for number, layer in enumerate(draft.stage.layers):
        for i, operator in enumerate(layer.operators):
            seconds = draft.exposed_of(number, i)
            if seconds > _LEAST and operator.bytes:
                found.append((-seconds / operator.bytes, number, i))
    return [(number, i) for _, number, i in sorted(found)]


def _releases(draft: Draft) -> list[tuple[int, int, Source]]:
    """Layer, operator and new source of what is there for long, the fewest seconds exposed for the bytes first.

    What is kept may go to any window with room, what is in a forward window to those of the backward.
    """
    stage = draft.stage
    found: list[tuple[float, int, int, Source]] = []
    for number, sources in enumerate(draft.layers):
        windows = windows_for(stage, number)
        for i, operator in enumerate(stage.layers[number].operators):
            source, seconds = sources[i], operator.seconds
            is_early = isinstance(source, int) and not stage.events[source].backward
            if not operator.bytes or operator.kind != "compute" or not (is_early or source == "keep"):
                continue
            until = stage.last_window[number][i]
            may = [at for at in windows if at < until and (stage.events[at].backward or not is_early)]
            roomy = max(may, key=draft.left.__getitem__, default=None)
            hidden = 0.0 if roomy is None else max(0.0, draft.left[roomy])
            to: Source = "demand" if roomy is None or hidden <= _LEAST else roomy
            exposed = seconds - min(hidden, seconds) - draft.exposed_of(number, i)
            found.append((exposed / operator.bytes / (1 if is_early else stage.in_flight), number, i, to))
    found.sort(key=lambda each: each[:3])
    return [(number, i, to) for _, number, i, to in found]
