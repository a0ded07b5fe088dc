"""What is chosen from scores: by hand, and what may not be chosen."""

from __future__ import annotations

import random

import pytest
import torch

from wastenot.moe.compress.choose import (
    Protect,
    drop_blocks,
    drop_experts,
    drop_layers,
    empty_plan,
    fewer_experts,
    iterate,
)
from wastenot.moe.compress.plan import DropPlan, Quantize, Shape, Slim, read_plan, write_plan
from wastenot.moe.compress.profile import Profile, ProfileConfig

TOKENS = 100.0


def profile_of(
    layer: list[float], gaps: list[list[float]], mass: list[list[float]], groups: int = 1, top_k: int = 2
) -> Profile:
    """A profile with these scores: of layers; of blocks, gaps[i][g - 1] for the g that begin at i; of experts."""
    layers, window = len(layer), max(map(len, gaps))
    made = []
    for n in range(layers):
        sums = {"tokens": torch.tensor(TOKENS), "ffn_cosine": torch.tensor(layer[n] * TOKENS, dtype=torch.float64)}
        ends = range(1, window + 1)
        block = [gaps[n + 1 - g][g - 1] if n + 1 >= g and len(gaps[n + 1 - g]) >= g else 0.0 for g in ends]
        sums["block_cosine_W"] = torch.tensor(block, dtype=torch.float64) * TOKENS
        if mass[n]:
            sums["mass_E"] = torch.tensor(mass[n], dtype=torch.float64) * TOKENS
            sums["routed_E"] = torch.tensor(mass[n]) * TOKENS
        made.append(sums)
    shape = Shape(
        experts=tuple(map(len, mass)),
        dense=tuple(n for n in range(layers) if not mass[n]),
        top_k=top_k,
        groups=groups,
        top_groups=max(1, groups // 2),
    )
    return Profile("base", shape, {}, ProfileConfig(window=window), tuple(made))


EVEN = [0.25, 0.25, 0.25, 0.25]


def test_layer_drop_takes_the_most_alike_and_of_equals_the_first():
    profile = profile_of([0.9, 0.95, 0.95, 0.8, 0.99], [[0.5]] * 5, [EVEN] * 5)
    assert drop_layers(empty_plan(profile), profile, 1).layers == (4,)
    assert drop_layers(empty_plan(profile), profile, 2).layers == (1, 4)
    assert drop_layers(empty_plan(profile), profile, 3).layers == (1, 2, 4)


def test_scores_that_differ_in_the_seventh_digit_are_equal():
    """As sums over other numbers of ranks differ."""
    for last in (0.9500001, 0.9499999):
        profile = profile_of([0.95, last], [[0.5]] * 2, [EVEN] * 2)
        assert drop_layers(empty_plan(profile), profile, 1).layers == (0,)


def test_dense_layers_are_no_candidates_of_layer_drop():
    profile = profile_of([0.99, 0.8, 0.7], [[0.5]] * 3, [[], EVEN, EVEN])
    assert drop_layers(empty_plan(profile), profile, 1).layers == (1,)
    with pytest.raises(ValueError, match="3 cannot be dropped of 2 MoE layers that may go; use 1 to 2"):
        drop_layers(empty_plan(profile), profile, 3)


def test_d10_a_second_layer_drop_looks_at_those_that_are_left():
    """Defect D10: the public code hooks modules that the first drop removed."""
    profile = profile_of([0.9, 0.95, 0.99], [[0.5]] * 3, [EVEN] * 3)
    once = drop_layers(empty_plan(profile), profile, 1)
    assert drop_layers(once, profile, 1).layers == (1, 2)


def test_discrete_blocks_are_the_most_alike_each_for_itself():
    profile = profile_of([0.5] * 4, [[0.9, 0.8], [0.95, 0.9], [0.7, 0.6], [0.92]], [EVEN] * 4)
    assert drop_blocks(empty_plan(profile), profile, 2).blocks == (1, 3)


def test_d4_the_window_of_consecutive_blocks_that_goes_is_the_one_that_was_scored():
    """Defect D4: the public code reads the scores of windows one block longer."""
    # Two blocks from 1 on change least; of three those from 0 on.
    gaps = [[0.9, 0.70, 0.99], [0.9, 0.85, 0.10], [0.9, 0.80], [0.9]]
    profile = profile_of([0.5] * 4, gaps, [EVEN] * 4)
    assert drop_blocks(empty_plan(profile), profile, 2, "consecutive").blocks == (1, 2)
    assert drop_blocks(empty_plan(profile), profile, 3, "consecutive").blocks == (0, 1, 2)


def test_protected_layers_stay():
    gaps = [[0.99, 0.9], [0.5, 0.4], [0.6, 0.5], [0.98]]
    profile = profile_of([0.99, 0.5, 0.6, 0.98], gaps, [EVEN] * 4)
    ends = Protect(first=1, last=1)
    assert drop_layers(empty_plan(profile), profile, 1, ends).layers == (2,)
    assert drop_blocks(empty_plan(profile), profile, 1, protect=ends).blocks == (2,)
    assert drop_blocks(empty_plan(profile), profile, 2, "consecutive", ends).blocks == (1, 2)


def test_one_block_is_left():
    profile = profile_of([0.5] * 2, [[0.9], [0.9]], [EVEN] * 2)
    with pytest.raises(ValueError, match="2 cannot be dropped of 1 blocks"):
        drop_blocks(empty_plan(profile), profile, 2)


MASS = [[0.4, 0.1, 0.2, 0.3], [0.25, 0.26, 0.24, 0.25], [0.05, 0.85, 0.06, 0.04]]


def test_experts_go_by_mass_in_each_layer():
    profile = profile_of([0.5] * 3, [[0.5]] * 3, MASS)
    plan = drop_experts(empty_plan(profile), profile, 3)
    assert plan.experts == {0: (1,), 1: (2,), 2: (3,)}
    assert drop_experts(plan, profile, 2).experts == {0: (1, 2), 1: (0, 2), 2: (0, 3)}


def test_layers_that_have_fewer_experts_already_keep_them():
    profile = profile_of([0.5] * 3, [[0.5]] * 3, [MASS[0], MASS[1][:3], [*MASS[2], 0.9]])
    plan = drop_experts(empty_plan(profile), profile, 4)
    assert plan.experts == {2: (3,)}
    assert plan.result.experts == (4, 3, 4)


def test_only_what_was_chosen_iteratively_says_so():
    profile = profile_of([0.9, 0.8, 0.7], [[0.5]] * 3, [EVEN] * 3)

    def again(plan):
        return iterate(plan, 1, lambda plan, scored: drop_layers(plan, scored, 1), lambda plan: profile)

    blocks = drop_blocks(empty_plan(profile), profile, 1)
    assert again(blocks).criteria == {"blocks": "cosine, discrete", "layers": "cosine, iterative"}


def test_experts_go_by_mass_over_all_layers():
    profile = profile_of([0.5] * 3, [[0.5]] * 3, MASS, top_k=1)
    plan = drop_experts(empty_plan(profile), profile, 3, scope="global")
    assert plan.experts == {2: (0, 2, 3)}
    assert plan.result.experts == (4, 4, 1)


def test_d7_global_expert_drop_after_layer_drop_cuts_the_experts_it_scored():
    """Defect D7: the public code's marker of a dropped layer shifts the experts of all later ones."""
    profile = profile_of([0.99, 0.5, 0.5], [[0.5]] * 3, MASS, top_k=1)
    plan = drop_layers(empty_plan(profile), profile, 1)
    plan = drop_experts(plan, profile, 3, scope="global")
    assert plan.layers == (0,)
    assert plan.experts == {2: (0, 3)}


def test_d9_d12_a_router_keeps_as_many_experts_as_it_chooses():
    """Defects D9 and D12: no experts left, and fewer than top-k."""
    profile = profile_of([0.5] * 3, [[0.5]] * 3, MASS)
    with pytest.raises(ValueError, match=r"the router chooses 2 .*; use 2"):
        drop_experts(empty_plan(profile), profile, 1)
    # By worth alone layer 2 would keep one.
    plan = drop_experts(empty_plan(profile), profile, 2, scope="global")
    assert min(plan.result.experts) == 2
    with pytest.raises(ValueError, match="drop at most 2, or the whole layer"):
        DropPlan(base="x", shape=profile.shape, experts={0: (0, 1, 2)})


def test_experts_left_divide_among_ranks():
    profile = profile_of([0.5] * 3, [[0.5]] * 3, [row + row for row in MASS], top_k=1)
    plan = drop_experts(empty_plan(profile), profile, 4, scope="global", multiple_of=2)
    assert all(left % 2 == 0 for left in plan.result.experts)
    with pytest.raises(ValueError, match="a multiple of 2; use 4"):
        drop_experts(empty_plan(profile), profile, 5, multiple_of=2)


def test_groups_of_a_limited_router_lose_equally_many():
    mass = [[0.01, 0.02, 0.03, 0.04, 0.2, 0.2, 0.2, 0.3]]
    profile = profile_of([0.5], [[0.5]], mass, groups=2)
    plan = drop_experts(empty_plan(profile), profile, 4)
    assert plan.experts == {0: (0, 1, 4, 5)}
    with pytest.raises(ValueError, match=r"\[2, 0\] go from the 2 groups"):
        DropPlan(base="x", shape=profile.shape, experts={0: (0, 1)})


def test_fewer_experts_count_among_the_survivors():
    profile = profile_of([0.5] * 3, [[0.5]] * 3, MASS)
    plan = drop_experts(empty_plan(profile), profile, 3)
    # Scores of what the plan leaves: of experts 0, 2, 3 of layer 0, and so on.
    left = profile_of([0.5] * 3, [[0.5]] * 3, [[0.5, 0.4, 0.1], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4]])
    assert fewer_experts(plan, left, [0, 1], 1, "mass").experts == {0: (1, 3), 1: (0, 2), 2: (3,)}


def test_iterative_drops_score_what_is_left():
    first = profile_of([0.9, 0.8, 0.7], [[0.5]] * 3, [EVEN] * 3)
    # Without layer 0 it is layer 2 that changes least.
    later = profile_of([0.0, 0.1, 0.9], [[0.5]] * 3, [EVEN] * 3)
    plan = iterate(
        empty_plan(first),
        2,
        lambda plan, scored: drop_layers(plan, scored, 1),
        lambda plan: later if plan.layers else first,
    )
    assert plan.layers == (0, 2)
    assert drop_layers(empty_plan(first), first, 2).layers == (0, 1)


def random_plan(draw: random.Random) -> DropPlan:
    layers = draw.randint(2, 8)
    dense = tuple(n for n in range(layers) if draw.random() < 0.2)
    shape = Shape(experts=tuple(0 if n in dense else 8 for n in range(layers)), dense=dense, top_k=2)
    blocks = tuple(sorted(draw.sample(range(layers), draw.randint(0, layers - 1))))
    gone = tuple(n for n in range(layers) if n not in blocks and draw.random() < 0.3)
    there = [n for n in shape.moe_layers if n not in blocks and n not in gone]
    experts = {n: tuple(sorted(draw.sample(range(8), draw.randint(1, 6)))) for n in there if draw.random() < 0.5}
    plan = DropPlan(base="b", shape=shape, blocks=blocks, layers=gone, experts=experts, profile="p")
    order = {n: tuple(draw.sample(plan.kept(n), len(plan.kept(n)))) for n in there if draw.random() < 0.3}
    return DropPlan(
        base="b",
        shape=shape,
        blocks=blocks,
        layers=gone,
        experts=experts,
        order=order,
        profile="p",
        slim=draw.choice([None, Slim(method="sparsegpt", pattern="2:4")]),
        quantize=draw.choice([None, Quantize(bits=8, group=64)]),
        criteria={"layers": "cosine"} if gone else {},
    )


def test_plans_come_back_from_their_files(tmp_path):
    draw = random.Random(0)
    for _ in range(200):
        plan = random_plan(draw)
        write_plan(plan, tmp_path / "plan.yaml")
        back = read_plan(tmp_path / "plan.yaml")
        assert back == plan and back.hash == plan.hash
        assert back.result.layers == len(plan.survivors)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("blocks: [1, 1]", "is not ascending, each once"),
        ("blocks: [7]", "there is no 7; this checkpoint has 3 layers, 0 to 2"),
        ("blocks: [0, 1, 2]", "leave one at least"),
        ("layers: [0]", "layers: 0 has no feed-forward network to drop"),
        ("experts: {0: [1]}", "layer 0 has none"),
        ("experts: {1: [4]}", "there is no 4"),
        ("order: {1: [0, 1, 2]}", "is no order of the experts that stay"),
        ("slim: {method: wnada}", "'wnada' is not one of wanda, sparsegpt, magnitude"),
        ("slim: {pattern: '2:4', sparsity: 0.6}", "use 0.5"),
        ("quantize: {bits: 5}", "use 4"),
        ("semantics: drop", "'drop' is not one of reroute, skip"),
        ("blokcs: [1]", "blokcs: unknown key"),
        ("experts: {1: [0]}\nlayers: [1]", "that layer's experts go already"),
        ("blocks: [1]\nlayers: [1]", "goes with its whole block already"),
    ],
)
def test_an_edited_plan_that_makes_no_sense_says_why(edit, message, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(f"version: 1\nbase: b\nshape: {{experts: [0, 4, 4], top_k: 2}}\n{edit}\n")
    with pytest.raises(ValueError, match=r"plan\.yaml: ") as caught:
        read_plan(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
