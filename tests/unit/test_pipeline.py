"""Cuts and placements of a pipeline, what its schedules accept, and losses that ride on activations."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from wastenot.launch.config import LoopConfig, TrainConfig
from wastenot.launch.layout_rules import micro_batches_fill_pipeline
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.config_size import count_parameters
from wastenot.moe.decoder import Decoder, Section, build_decoder
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.lynx import cut as planners
from wastenot.parallel.lynx.schedules import SCHEDULES, build
from wastenot.parallel.mesh import single
from wastenot.parallel.pipeline import with_loss
from wastenot.parallel.stages import Stages, even_cut, lay_out, whole


@pytest.mark.parametrize(
    ("costs", "stages", "cut"),
    [
        ([1, 1, 1, 1], 2, (2, 2)),
        ([1] * 7, 3, (3, 2, 2)),
        ([5, 1, 1, 1, 1, 1], 2, (1, 5)),
        ([1, 1, 1, 9], 2, (3, 1)),
        ([1, 1, 1, 1, 9], 3, (2, 2, 1)),
        ([3], 1, (1,)),
    ],
)
def test_cuts_by_hand(costs, stages, cut):
    assert even_cut(costs, stages) == cut


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=60)
def test_no_cut_has_a_cheaper_dearest_stage(costs, data):
    stages = data.draw(st.integers(1, len(costs)))

    def judged(cut: tuple[int, ...]) -> tuple[int, int, list[int]]:
        ends = list(itertools.accumulate(cut))
        sums = [sum(costs[end - size : end]) for end, size in zip(ends, cut, strict=True)]
        return max(sums), sum(each**2 for each in sums), [-size for size in cut]

    inner = itertools.combinations(range(1, len(costs)), stages - 1)
    cuts = [tuple(b - a for a, b in itertools.pairwise((0, *places, len(costs)))) for places in inner]
    assert even_cut(costs, stages) == min(cuts, key=judged)


@pytest.mark.parametrize(("layers", "stages"), [(7, 2), (24, 7), (10, 10), (61, 16)])
def test_equal_layers_are_cut_as_the_planner_cuts_them(layers, stages):
    assert even_cut([3] * layers, stages) == planners.even_cut(SimpleNamespace(layers=layers), stages)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", SCHEDULES)
def test_stages_lie_where_the_planner_and_torch_put_them(name):
    config = ParallelConfig(pipeline=4, schedule=name)  # pyright: ignore[reportArgumentType]
    planned = build(name, num_ranks=4, num_micro_batches=8)
    assert config.num_stages == planned.num_stages
    for rank in range(4):
        stages = lay_out(config, [1] * 16, rank)
        assert list(stages.ranks) == planned.rank_of_stage.tolist()
        style = "v" if name == "dualpipev" else "loop"
        assert dict(enumerate(stages.ranks)) == generate_stage_to_rank_mapping(4, config.num_stages, style=style)
        assert sorted(stages.own) == sorted(planned.stages[rank].tolist())


@pytest.mark.parametrize(("name", "ranks"), list(itertools.product(SCHEDULES, (2, 3, 4))))
def test_micro_batches_are_legal_where_torch_and_the_planner_have_an_order(name, ranks):
    config = ParallelConfig(pipeline=ranks, schedule=name)  # pyright: ignore[reportArgumentType]
    for micro_batches in range(1, 20):
        rounds = max(1, micro_batches // ranks)
        torch_runs = {
            "gpipe": True,
            "1f1b": micro_batches >= ranks,
            "interleaved": micro_batches % rounds == 0,
            "zb-h1": micro_batches % rounds == 0,
            "dualpipev": micro_batches >= 2 * ranks,
        }[name]
        try:
            build(name, num_ranks=ranks, num_micro_batches=micro_batches)
            planned = True
        except ValueError:
            planned = False
        assert config.runs(micro_batches) == (torch_runs and planned)


def test_the_number_of_micro_batches_that_is_offered_is_legal():
    for name, ranks, accumulate in itertools.product(SCHEDULES, (2, 3), (1, 2, 3, 5)):
        parallel = ParallelConfig(pipeline=ranks, schedule=name)  # pyright: ignore[reportArgumentType]
        train = LoopConfig(batch=60, accumulate=accumulate)
        for violation in micro_batches_fill_pipeline(TrainConfig(parallel=parallel, train=train)):
            offered = int(violation.message.rpartition("use ")[2])
            assert parallel.runs(offered)
            assert 60 % offered == 0


MODEL = ModelConfig(vocab_size=19, d_model=16, layers=4, heads=2, moe=MoEConfig(experts=4, d_expert=8, every=2))


def test_parts_of_a_model_have_the_names_and_the_values_of_the_whole():
    whole_model = dict(build_decoder(MODEL, RouterConfig(), single()).state_dict())
    found = {}
    for rank in range(2):
        stages = lay_out(ParallelConfig(pipeline=2, schedule="interleaved", cut=(1, 1, 1, 1)), [1] * 4, rank)
        part = build_decoder(MODEL, RouterConfig(), single(), stages=stages)
        assert part.moe_layers == ([] if rank == 0 else [0, 1])
        assert not found.keys() & part.state_dict().keys()
        found |= part.state_dict()
        assert hasattr(part, "embedding") == (rank == 0)
        assert hasattr(part, "norm") == (rank == 1)
    assert found.keys() == whole_model.keys()
    assert all(tensor.equal(whole_model[name]) for name, tensor in found.items())
    parameters = sum(tensor.numel() for name, tensor in found.items() if not name.endswith("bias_E"))
    assert parameters == count_parameters(MODEL, RouterConfig())["total"]


def test_sections_hold_the_weights_of_their_stage_and_make_together_what_the_whole_makes():
    model = build_decoder(MODEL, RouterConfig(), single())
    cut = Stages((range(1), range(1, 4)), (0, 0))
    parts = build_decoder(MODEL, RouterConfig(), single(), stages=cut)
    first, second = (Section(parts, stage) for stage in cut.own)
    assert {*first.parameters(), *second.parameters()} == set(parts.parameters())
    assert not {*first.parameters()} & {*second.parameters()}
    tokens = torch.arange(10).view(2, 5)
    hidden, routings = first(tokens)
    hidden, more = second(hidden)
    expected = model(tokens)
    assert hidden.equal(expected.hidden_BSD)
    assert parts(tokens).hidden_BSD.equal(hidden)
    assert len(routings) + len(more) == len(expected.routings)
    assert isinstance(parts, Decoder)
    assert whole(4).held == (0, 1, 2, 3)


def test_a_loss_rides_on_activations_without_changing_them():
    x = torch.randn(3, requires_grad=True)
    w = torch.tensor(2.0, requires_grad=True)
    y = with_loss(3 * x, w.square())
    assert y.equal(3 * x)
    torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)
    y.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [3, 6, 9]
    assert w.grad is not None
    assert w.grad.item() == 4
    # torch's stages do so with what they have passed on.
    y.detach_()
