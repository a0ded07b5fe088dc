"""A slow rank is named, an even team is not."""

from __future__ import annotations

import pytest

from wastenot.launch.straggler import straggler


def test_the_rank_that_waits_least_is_named_with_what_it_costs() -> None:
    found = straggler([4.0, 0.5, 4.5, 3.5], seconds=10.0, steps=20)
    assert found is not None and found.rank == 1 and found.part == pytest.approx(0.3)
    assert found.describe().startswith("rank 1 keeps the others waiting for 30 % of the time")


@pytest.mark.parametrize(
    ("waited", "seconds", "steps"),
    [
        ([1.0, 1.2, 0.9, 1.1], 10.0, 20),
        # Two are slow: neither makes the other wait.
        ([4.0, 0.5, 0.6, 3.5], 10.0, 20),
        ([4.0, 0.5], 10.0, 9),
        ([2.0, 0.1], 4.0, 20),
        ([5.0], 10.0, 20),
        ([], 10.0, 20),
    ],
)
def test_an_even_team_two_slow_ranks_or_a_short_while_name_nobody(
    waited: list[float], seconds: float, steps: int
) -> None:
    assert straggler(waited, seconds, steps) is None
