"""Gives each operator that is computed in some forward window one of them (METHODS L5)."""

from __future__ import annotations

from .problem import Assignment, Source, Stage


def unpool(stage: Stage, assignment: Assignment) -> Assignment:
    """`assignment` has all of the forward's in the last of its windows.

    Window by window takes the longest that is ready and fits; what is left over goes where the most room is.
    """
    forward = [at for at, event in enumerate(stage.events) if not event.backward and event.layer >= 0]
    if not forward:
        return assignment
    found: list[list[Source]] = [list(sources) for sources in assignment]
    waiting = {
        (number, i)
        for number, sources in enumerate(assignment)
        for i, source in enumerate(sources)
        if source == forward[-1]
    }
    left = {at: window.room for at in forward if (window := stage.events[at].window) is not None}

    def seconds(each: tuple[int, int]) -> float:
        return stage.layers[each[0]].operators[each[1]].seconds

    def inputs(each: tuple[int, int]) -> list[tuple[int, int]]:
        return [(each[0], j) for j in stage.layers[each[0]].inputs[each[1]]]

    def put(each: tuple[int, int], at: int) -> None:
        found[each[0]][each[1]] = at
        left[at] -= seconds(each)
        waiting.discard(each)

    for at in forward:
        while True:
            ready = [e for e in waiting if seconds(e) <= left[at] and waiting.isdisjoint(inputs(e))]
            if not ready:
                break
            put(max(ready, key=lambda each: (seconds(each), each)), at)
    for each in sorted(waiting):
        sources = (found[number][j] for number, j in inputs(each))
        first = max((source for source in sources if isinstance(source, int)), default=forward[0])
        put(each, max((at for at in forward if at >= first), key=left.__getitem__))
    return tuple(map(tuple, found))
