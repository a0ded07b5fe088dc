"""Experts in an order in which equal consecutive shares of them, one for each rank, are about equally loaded.

Experts may be reordered freely along with the rows of their router (inside groups only, where its choice is limited by
group): the model stays the same function. Longest load first onto the lightest share with room, then exchanges between
the heaviest share and the others for as long as one helps. Torch-free and deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["balanced_order", "imbalance"]

_LEAST_GAIN = 1e-12
"""Of the whole load: what is less is rounding."""


def balanced_order(load: Sequence[float], parts: int, groups: int = 1) -> tuple[int, ...]:
    """Numbers of the experts, `load` being theirs in the order they have now, in the order they should have.

    Each `groups`-th of the experts stays together, and where it is. The heaviest of `parts` shares carries no more
    than it does now. Raises ValueError where experts cannot be cut into equal shares or groups, or a load is negative
    or no number.
    """
    count = len(load)
    for name, number in (("parts", parts), ("groups", groups)):
        if number < 1 or count % number:
            nearest = max(d for d in range(1, min(max(number, 1), count) + 1) if count % d == 0) if count else 1
            raise ValueError(f"{name}: {count} experts cannot be cut into {number} equal ones; use {nearest}")
    if wrong := [value for value in load if not 0 <= value < math.inf]:
        raise ValueError(f"load: {wrong[0]} is no load; use counts of tokens")
    given = tuple(range(count))
    if not count:
        return given
    found = _refined(_longest_first(load, parts, groups), load, parts, groups)
    # From where they are now an exchange sometimes leads further.
    near = _refined(list(given), load, parts, groups)
    return tuple(min((near, found, list(given)), key=lambda order: _heaviest(order, load, parts)))


def imbalance(load: Sequence[float], order: Sequence[int], parts: int) -> float:
    """Load of the heaviest of `parts` equal shares of `order`, over the mean; 1 is even. 1 where there is no load."""
    mean = sum(load) / parts
    return _heaviest(order, load, parts) / mean if mean else 1.0


def _heaviest(order: Sequence[int], load: Sequence[float], parts: int) -> float:
    return max(_loads(order, load, parts))


def _loads(order: Sequence[int], load: Sequence[float], parts: int) -> list[float]:
    size = len(order) // parts
    return [math.fsum(load[expert] for expert in order[first : first + size]) for first in range(0, len(order), size)]


def _longest_first(load: Sequence[float], parts: int, groups: int) -> list[int]:
    """Each expert, from the most loaded on, goes to the lightest share that has a slot of its group left."""
    count = len(load)
    share, group = count // parts, count // groups
    slots: list[list[list[int]]] = [[[] for _ in range(parts)] for _ in range(groups)]
    for slot in reversed(range(count)):
        slots[slot // group][slot // share].append(slot)
    order, loads = [0] * count, [0.0] * parts
    for expert in sorted(range(count), key=lambda expert: (-load[expert], expert)):
        free = slots[expert // group]
        lightest = min((part for part in range(parts) if free[part]), key=lambda part: (loads[part], part))
        order[free[lightest].pop()] = expert
        loads[lightest] += load[expert]
    return order


def _refined(order: list[int], load: Sequence[float], parts: int, groups: int) -> list[int]:
    """Exchanges of an expert of the heaviest share, the one each time that leaves the heavier of both lightest."""
    count, least = len(order), _LEAST_GAIN * math.fsum(load)
    share, group = count // parts, count // groups
    # Each exchange lowers the heaviest share of two; a bound all the same, against rounding.
    for _ in range(count * count):
        loads = _loads(order, load, parts)
        heaviest = max(range(parts), key=lambda part: (loads[part], -part))
        best, exchange = loads[heaviest] - least, None
        for here in range(heaviest * share, (heaviest + 1) * share):
            for there in range(here // group * group, (here // group + 1) * group):
                moved = load[order[here]] - load[order[there]]
                after = max(loads[heaviest] - moved, loads[there // share] + moved)
                if there // share != heaviest and after < best:
                    best, exchange = after, (here, there)
        if exchange is None:
            break
        here, there = exchange
        order[here], order[there] = order[there], order[here]
    return order
