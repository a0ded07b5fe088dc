"""Orders of experts in which ranks share the load: legal, deterministic, never worse than before, near the best."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wastenot.moe.compress.placement import balanced_order, imbalance
from wastenot.moe.compress.plan import DropPlan, Shape


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], int, int]:
    """Loads, parts and groups that divide them."""
    parts, groups = draw(st.integers(1, 6)), draw(st.sampled_from([1, 1, 2, 4]))
    count = parts * groups * draw(st.integers(1, 4))
    return draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count)), parts, groups


@given(cases())
def test_an_order_keeps_groups_together_and_is_never_worse(case: tuple[list[float], int, int]) -> None:
    load, parts, groups = case
    order = balanced_order(load, parts, groups)
    width = len(load) // groups
    for first in range(0, len(load), width):
        assert sorted(order[first : first + width]) == list(range(first, first + width))
    assert imbalance(load, order, parts) <= imbalance(load, range(len(load)), parts)
    assert order == balanced_order(list(load), parts, groups)


def test_by_hand() -> None:
    # Two ranks, four experts: the heaviest beside the lightest.
    order = balanced_order([9, 7, 2, 1], 2)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 3}), frozenset({1, 2})}
    assert imbalance([9, 7, 2, 1], order, 2) == 10 / 9.5
    # What is even already stays as it is, and so does what one rank holds.
    assert balanced_order([3, 1, 1, 3], 2) == (0, 1, 2, 3)
    assert balanced_order([5, 1, 2, 3], 1) == (0, 1, 2, 3)
    assert balanced_order([0, 0, 0, 0], 4) == (0, 1, 2, 3)
    assert balanced_order([], 1) == ()


def test_groups_that_are_shares_cannot_be_balanced() -> None:
    assert imbalance([8, 8, 1, 1], balanced_order([8, 8, 1, 1], 2, 2), 2) == 16 / 9
    order = balanced_order([8, 7, 1, 1, 4, 2, 2, 2], 4, 2)
    assert imbalance([8, 7, 1, 1, 4, 2, 2, 2], order, 4) == 9 / 6.75


def test_plans_refuse_orders_that_move_experts_between_groups() -> None:
    """Of a group-limited router that would be another function."""
    shape = Shape(experts=(8,), top_k=2, groups=2, top_groups=1)
    with pytest.raises(ValueError, match=r"order\.0: .* moves experts between the 2 groups"):
        DropPlan(base="a", shape=shape, order={0: (4, 1, 2, 3, 0, 5, 6, 7)})
    with pytest.raises(ValueError, match=r"order\.0: .* moves experts between the 2 groups"):
        DropPlan(base="a", shape=shape, experts={0: (0, 4)}, order={0: (1, 2, 5, 3, 6, 7)})
    assert DropPlan(base="a", shape=shape, experts={0: (0, 4)}, order={0: (3, 2, 1, 7, 5, 6)}).kept(0)[0] == 3


def best(load: list[float], parts: int) -> float:
    """The least load of the heaviest share, of all ways to share."""
    size, found = len(load) // parts, float("inf")

    def share(left: tuple[int, ...], heaviest: float) -> None:
        nonlocal found
        if heaviest >= found:
            return
        if not left:
            found = heaviest
            return
        for others in itertools.combinations(left[1:], size - 1):
            taken = {left[0], *others}
            share(tuple(i for i in left if i not in taken), max(heaviest, sum(load[i] for i in taken)))

    share(tuple(range(len(load))), 0.0)
    return found


@pytest.mark.parametrize(("count", "parts"), [(8, 2), (8, 4), (9, 3), (10, 2), (12, 4)])
def test_small_cases_are_near_the_best_there_is(count: int, parts: int) -> None:
    draw = random.Random(count * parts)
    ratios = []
    for _ in range(40):
        load = [draw.paretovariate(1.5) for _ in range(count)]
        found = imbalance(load, balanced_order(load, parts), parts) * sum(load) / parts
        ratios.append(found / best(load, parts))
    assert min(ratios) > 1 - 1e-9
    assert max(ratios) < 1.1
    assert sum(ratios) / len(ratios) < 1.01


def test_many_skewed_experts_become_even() -> None:
    draw = random.Random(0)
    load = sorted((draw.paretovariate(2) for _ in range(128)), reverse=True)
    assert imbalance(load, range(128), 8) > 2
    assert imbalance(load, balanced_order(load, 8), 8) < 1.01


@pytest.mark.parametrize(
    ("load", "parts", "groups", "message"),
    [
        ([1, 2, 3], 2, 1, "parts: 3 experts cannot be cut into 2 equal ones; use 1"),
        ([1, 2, 3, 4], 0, 1, "parts: 4 experts cannot be cut into 0 equal ones; use 1"),
        ([1, 2, 3, 4], 2, 3, "groups: 4 experts cannot be cut into 3 equal ones; use 2"),
        ([1, -2], 2, 1, "load: -2 is no load"),
        ([1, float("nan")], 2, 1, "load: nan is no load"),
    ],
)
def test_loads_that_cannot_be_shared_are_refused(load: list[float], parts: int, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_order(load, parts, groups)
