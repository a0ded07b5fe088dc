"""The recomputation-aware cut (METHODS L6)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from test_lynx_evaluate import LAYER

from wastenot.parallel.lynx.gpt_profile import gpt_layer
from wastenot.parallel.lynx.partition import Extra, partition, plain_seconds
from wastenot.parallel.lynx.problem import Layer
from wastenot.parallel.lynx.solution import InfeasibleError

AMPLE = 1 << 50


def test_equal_stages_stay_equal() -> None:
    found = partition([LAYER] * 8, in_flight=[4, 3, 2, 1], budget=AMPLE)
    assert (found.cut, found.moves) == ((2, 2, 2, 2), 0)
    assert found.seconds == 2 * plain_seconds(LAYER)


def test_plain_time_counts_each_part_once() -> None:
    assert plain_seconds(LAYER) == (2 + 1 + 4) + 3 + (8 + 5 + 5)
    # Collectives' time is that of their windows.
    assert plain_seconds(gpt_layer()) == pytest.approx((3.262 + 4.4 + 3.259 + 4.506) / 1e3)


def test_a_stage_with_more_to_do_gives_layers_away() -> None:
    def extra(layers: Sequence[Layer], is_first: bool, is_last: bool) -> Extra:
        return Extra(seconds=2.5 * plain_seconds(LAYER) if is_last else 0.0)

    found = partition([LAYER] * 16, in_flight=[4, 3, 2, 1], budget=AMPLE, extra=extra)
    assert sum(found.cut) == 16
    assert found.cut[-1] < 4
    assert found.seconds == 5 * plain_seconds(LAYER)


def test_layers_keep_their_order_along_the_chain() -> None:
    slow = Layer(name="slow", operators=LAYER.operators, backward=LAYER.backward * 3)
    found = partition([slow, slow, LAYER, LAYER, LAYER, LAYER], in_flight=[1, 1, 1], budget=AMPLE)
    layers = [layer for part in found.parts for layer in part.stage.layers]
    assert layers == [slow, slow, LAYER, LAYER, LAYER, LAYER]
    assert found.cut[0] == 1


def test_more_micro_batches_in_flight_leave_the_first_stage_fewer_layers() -> None:
    # Keeping everything takes 600 MB a layer and micro-batch.
    layers = [gpt_layer()] * 16
    budget = 3_200_000_000
    found = partition(layers, in_flight=[8, 1], budget=budget)
    assert found.cut[0] < found.cut[1]
    assert all(part.solution.outcome.peak <= budget for part in found.parts)


def test_what_fits_nowhere_is_said() -> None:
    with pytest.raises(InfeasibleError, match="do not fit"):
        partition([LAYER] * 4, in_flight=[2, 1], budget=10)
    with pytest.raises(ValueError, match="5 stages for 4 layers; use 1 to 4"):
        partition([LAYER] * 4, in_flight=[1] * 5, budget=AMPLE)


def test_only_changed_stages_are_solved_again() -> None:
    asked = []

    def extra(layers: Sequence[Layer], is_first: bool, is_last: bool) -> Extra:
        asked.append((len(layers), is_first, is_last))
        return Extra(seconds=3.0 * plain_seconds(LAYER) if is_last else 0.0)

    partition([LAYER] * 12, in_flight=[2, 2, 2, 2], budget=AMPLE, extra=extra)
    assert len(asked) == len(set(asked))
