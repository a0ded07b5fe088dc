"""Ways to give each layer of a stage a policy, and which of them none beats: a small knapsack over counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .groups import Group

_LEVELS = 8
"""Bounds on transient bytes that are tried."""
_MOST_CHOICES = 300
"""Of a structure or of several, once none of them beats another."""
Counts = tuple[tuple[tuple[int, int], ...], ...]
"""Of each group, how many layers take which policy: (place in the front, number of layers)."""


@dataclass(frozen=True)
class Choices:
    """Ways to give each layer of some groups a policy, by rising bytes and falling seconds."""

    bytes: np.ndarray
    seconds: np.ndarray
    counts: list[Counts]


def one_each(group: Group, allowed: Sequence[int]) -> Choices:
    """All layers take one policy."""
    n = len(group.numbers)
    return _choices(
        np.array([n * group.front[p].bytes for p in allowed], dtype=float),
        np.array([n * group.front[p].seconds + group.has_ends * group.front[p].ends for p in allowed]),
        [(((p, n),),) for p in allowed],
    )


def mixed(group: Group, allowed: Sequence[int]) -> Choices:
    """j layers take a policy of the hull, one takes any, and the rest the hull's next."""
    n = len(group.numbers)
    each_bytes = np.array([float(group.front[p].bytes) for p in allowed])
    each_seconds = np.array([group.front[p].seconds for p in allowed])
    hull = _hull(each_bytes, each_seconds)
    pairs = list(pairwise(hull)) or [(hull[0], hull[0])]
    p, q = np.array(pairs).T
    j = np.arange(n)
    totals = []
    for value in (each_bytes, each_seconds):
        two = j[None, :] * value[p][:, None] + (n - 1 - j)[None, :] * value[q][:, None]
        totals.append((two[:, :, None] + value).ravel())
    shape = (len(pairs), n, len(allowed))

    def counts(at: int) -> Counts:
        pair, first, other = (int(each) for each in np.unravel_index(at, shape))
        named = ((pairs[pair][0], first), (other, 1), (pairs[pair][1], n - 1 - first))
        return (tuple((allowed[which], count) for which, count in named if count),)

    return _choices(totals[0], totals[1], counts)


def _hull(size: np.ndarray, seconds: np.ndarray) -> list[int]:
    """Places of the lower convex hull, by rising bytes."""
    found: list[int] = []
    for c in map(int, np.lexsort((seconds, size))):
        if found and seconds[c] >= seconds[found[-1]]:
            continue
        while len(found) > 1:
            a, b = found[-2:]
            if (seconds[b] - seconds[a]) * (size[c] - size[a]) < (seconds[c] - seconds[a]) * (size[b] - size[a]):
                break
            found.pop()
        found.append(c)
    return found


def _choices(
    size: np.ndarray,
    seconds: np.ndarray,
    counts: Sequence[Counts] | Callable[[int], Counts],
) -> Choices:
    """Those that none beats, thinned out where they are many."""
    order = np.lexsort((seconds, size))
    best = np.minimum.accumulate(seconds[order])
    order = order[np.concatenate([[True], best[1:] < best[:-1]])]
    if len(order) > _MOST_CHOICES:
        order = order[np.linspace(0, len(order) - 1, _MOST_CHOICES).round().astype(int)]
    of = counts if callable(counts) else counts.__getitem__
    return Choices(size[order], seconds[order], [of(int(at)) for at in order])


def _together(first: Choices, second: Choices) -> Choices:
    size = (first.bytes[:, None] + second.bytes).ravel()
    seconds = (first.seconds[:, None] + second.seconds).ravel()
    width = len(second.counts)
    return _choices(size, seconds, lambda at: first.counts[at // width] + second.counts[at % width])


def candidates(
    parts: Sequence[Group], ways: Callable[[Group, Sequence[int]], Choices]
) -> Iterator[tuple[int, Choices]]:
    """For several bounds on transient bytes: the bound, and the choices whose policies keep it."""
    least = max(min(p.transient for p in group.front) for group in parts)
    levels = sorted({p.transient for group in parts for p in group.front if p.transient >= least})
    if len(levels) > _LEVELS:
        levels = [levels[round(n * (len(levels) - 1) / (_LEVELS - 1))] for n in range(_LEVELS)]
    for level in levels:
        total: Choices | None = None
        for group in parts:
            more = ways(group, [n for n, p in enumerate(group.front) if p.transient <= level])
            total = more if total is None else _together(total, more)
        assert total is not None
        yield level, total
