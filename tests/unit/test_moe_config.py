"""The configurations of the model check themselves where Python builds them, too: no YAML, no command."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from wastenot.moe.config import EmulateConfig, ModelConfig, MoEConfig, RectifyConfig, RouterConfig

OWNERS: list[Any] = [EmulateConfig, RectifyConfig, RouterConfig, MoEConfig, ModelConfig]
CHOICES = [
    (owner, name, get_args(kind))
    for owner in OWNERS
    for name, kind in get_type_hints(owner).items()
    if get_origin(kind) is Literal
]


def refused(owner: Any, **values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        owner(**values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("owner", "name", "choices"), CHOICES)
def test_a_misspelt_choice_is_refused_with_all_that_are_allowed_and_the_nearest(owner, name, choices):
    for choice in choices:
        for wrong in (f"{choice}x", choice.upper()):
            expected = f"{name}: {wrong!r} is not one of {', '.join(choices)}; nearest: {choice}"
            assert refused(owner, **{name: wrong}) == expected
    assert refused(owner, **{name: 7}) == f"{name}: 7 is not one of {', '.join(choices)}"


def test_the_choices_are_those_we_know_of():
    assert {name for _, name, _ in CHOICES} >= {"kind", "score", "normalize", "priority", "balance_over", "select"}
    assert {name for _, name, _ in CHOICES} >= {"dispatch", "qk_norm", "init_residual"}


@pytest.mark.parametrize("factor", [float("inf"), 1e300, 1.1e6])
def test_slots_beyond_all_use_are_refused(factor):
    assert "use at most 1000000, or null" in refused(RouterConfig, capacity_factor=factor)


def test_a_capacity_factor_that_is_no_number_is_refused():
    assert refused(RouterConfig, capacity_factor=float("nan")).startswith("capacity_factor: nan is not a number; use")
    assert "leaves no slot" in refused(RouterConfig, capacity_factor=-float("inf"))
