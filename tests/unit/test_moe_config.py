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


def test_counts_of_a_layer_say_what_each_layer_has():
    model = ModelConfig(layers=5, moe=MoEConfig(experts=8, per_layer=(8, 0, 0, 6, 8), dense=(1,)))
    assert [model.num_experts(layer) for layer in range(5)] == [8, 0, 0, 6, 8]
    assert [model.is_moe(layer) for layer in range(5)] == [True, False, False, True, True]
    assert [model.is_dense(layer) for layer in range(5)] == [False, True, False, False, False]
    assert [model.has_ffn(layer) for layer in range(5)] == [True, True, False, True, True]
    assert model.expert_counts == {0: 8, 3: 6, 4: 8}
    assert [model.nth_moe(layer) for layer in (3, 4)] == [1, 2]


def test_without_counts_of_a_layer_experts_come_in_the_rhythm_of_every_and_first_dense():
    model = ModelConfig(layers=6, moe=MoEConfig(experts=8, every=2, first_dense=2))
    assert model.expert_counts == {3: 8, 5: 8}
    assert all(map(model.has_ffn, range(6)))
    dense = ModelConfig(moe=None)
    assert dense.expert_counts == {}
    assert all(map(dense.is_dense, range(4)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_layer": (8, -1)}, "per_layer: -1 is negative; use 0 for a layer without experts"),
        ({"per_layer": (6, 4)}, "experts: 8 is not that of the fullest layer in per_layer; use 6"),
        ({"per_layer": (8, 0), "every": 2}, "every: 2 has no effect with per_layer; use 1"),
        ({"per_layer": (0, 8), "first_dense": 1}, "first_dense: 1 has no effect with per_layer; use 0"),
        ({"dense": (0,)}, "dense: [0] has no effect without per_layer; use []"),
        ({"per_layer": (8, 0), "dense": (0, 1)}, "the layers [1] that have 0 in per_layer; use [1]"),
        ({"per_layer": (8, 0), "dense": (7,)}, "the layers [1] that have 0 in per_layer; use []"),
        ({"per_layer": (0, 8, 0), "dense": (2, 0)}, "is not in order, each once, of the layers [0, 2]"),
        ({"per_layer": (0, 8, 0), "dense": (2, 2)}, "use [2]"),
    ],
)
def test_counts_of_a_layer_that_contradict_each_other_are_refused(values, message):
    assert message in refused(MoEConfig, **values)


def test_counts_of_another_number_of_layers_are_refused_with_the_nearest_ones():
    few, many = MoEConfig(per_layer=(8, 4)), MoEConfig(per_layer=(8, 0, 4))
    assert refused(ModelConfig, layers=3, moe=few) == (
        "moe: per_layer: [8, 4] has 2 entries for layers: 3; use for example [8, 4, 4], or layers: 2"
    )
    assert refused(ModelConfig, layers=2, moe=many).endswith("use for example [8, 0], or layers: 3")
