"""`bench parity` judges curves rightly, and its runs go through the real launch path."""

import dataclasses
import math

import pytest
import yaml

from wastenot.launch.layout_rules import world_rules
from wastenot.launch.settings import dump_config, parse_config
from wastenot.parallel.config import ParallelConfig
from wastenot.tools.bench import parity
from wastenot.tools.bench.parity import Curve


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return parity.make_corpus(tmp_path_factory.mktemp("parity"))


def curves(changed):
    alone = Curve([4.0, 2.0], [1.0, 0.5], 0.0)
    return dict.fromkeys(parity.LAYOUTS, alone) | {parity.LAYOUTS[-1]: changed}


def test_layouts_have_names():
    assert parity.name_of(ParallelConfig(data=1)) == "1 rank"
    assert parity.name_of(ParallelConfig(data=2, shard=4, expert=2)) == "EP2xFSDP4xDP2"
    assert len(set(map(parity.name_of, parity.LAYOUTS))) == len(parity.LAYOUTS)


def test_differences_are_relative_and_the_largest_step_counts():
    assert parity.largest_difference([4.0, 2.2], [4.0, 2.0]) == pytest.approx(0.1)
    assert parity.largest_difference([4.0, 2.0], [4.0, 2.0]) == 0


@pytest.mark.parametrize(("loss", "norm", "met"), [(2e-6, 2e-5, [True, True]), (2e-4, 2e-3, [False, False])])
def test_goals_are_those_of_the_precision(loss, norm, met):
    changed = Curve([4.0, 2.0 + loss], [1.0, 0.5 + norm], 0.1)
    rows, goals = parity.compare("capacity", "fp32", curves(changed))
    assert [row["bitwise"] for row in rows] == [True] * (len(parity.LAYOUTS) - 1) + [False]
    assert [goal.met for goal in goals] == met
    assert goals[0].value == pytest.approx(loss / 2)
    assert not any(goal.met for goal in parity.compare("capacity", "fp64", curves(changed))[1])


def test_curve_with_nan_meets_no_goal():
    changed = Curve([4.0, math.nan], [math.nan, 0.5], 0.0)
    assert not any(goal.met for goal in parity.compare("dropless", "fp32", curves(changed))[1])


@pytest.mark.parametrize("mode", list(parity.ROUTERS))
@pytest.mark.parametrize("layout", parity.LAYOUTS, ids=parity.name_of)
def test_every_run_is_a_legal_configuration(mode, layout, corpus, tmp_path):
    config = parity.configure(mode, "fp64", layout, corpus, tmp_path / "run")
    if layout not in parity.layouts(mode):
        is_cut = layout.tensor > 1 and config.router.emulate is not None
        assert is_cut or ("padded" in mode and layout.expert == 1)
        return
    assert parse_config(yaml.safe_load(dump_config(config)), "here") == config
    assert not world_rules(config, layout.world())


def test_corpus_is_the_same_wherever_it_is_made(corpus, tmp_path):
    assert parity.make_corpus(tmp_path).name == corpus.name, "the name carries a hash of the text"


def test_two_ranks_train_as_one_does(corpus, tmp_path):
    curves = []
    for layout in parity.LAYOUTS[:2]:
        config = parity.configure("capacity", "fp64", layout, corpus, tmp_path / parity.name_of(layout))
        short = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, steps=3),
            schedule=dataclasses.replace(config.schedule, warmup_steps=1),
        )
        curves.append(parity.train(short))
    alone, together = curves
    assert len(alone.losses) == 3 and alone.losses[2] < alone.losses[0]
    assert alone.dropped == together.dropped > 0, "capacity binds"
    assert parity.largest_difference(together.losses, alone.losses) <= 1e-9
    assert parity.largest_difference(together.norms, alone.norms) <= 1e-9


def test_run_that_fails_says_what_it_said(corpus, tmp_path):
    config = parity.configure("dropless", "fp32", parity.LAYOUTS[0], tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(RuntimeError, match="nowhere"):
        parity.train(config)
