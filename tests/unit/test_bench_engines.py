"""`bench engines` judges curves rightly, and its runs are legal and differ in their engine alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import yaml

from wastenot.launch.engine_config import DeepSpeedConfig
from wastenot.launch.settings import dump_config, parse_config
from wastenot.tools.bench import engines
from wastenot.tools.bench.engines import CONTENDERS, Contender
from wastenot.tools.bench.parity import Curve, make_corpus, name_of


def test_every_stage_of_zero_and_every_layout_is_there():
    assert [each.zero for each in CONTENDERS if each.engine == "deepspeed"] == [0, 1, 2, 3]
    assert [name_of(each.layout) for each in CONTENDERS if each.engine == "megatron"] == ["DP2", "EP2xDP2", "PP2"]
    assert len({(each.name, name_of(each.layout)) for each in CONTENDERS}) == len(CONTENDERS)


@pytest.mark.parametrize("optimizer", ["adapprox", "adamw"])
@pytest.mark.parametrize("router", list(engines.ROUTERS))
def test_every_run_is_legal_and_differs_from_the_native_one_in_its_engine_alone(router, optimizer, tmp_path):
    corpus = make_corpus(tmp_path)
    for contender in CONTENDERS:
        config = engines.config_of(contender, router, optimizer, corpus, tmp_path / "run")
        assert parse_config(yaml.safe_load(dump_config(config)), "here") == config
        assert config.router.rectify.is_on == (router == "rectified")
        native = engines.config_of(Contender("native", contender.layout), router, optimizer, corpus, tmp_path / "run")
        assert replace(config, engine="native", deepspeed=DeepSpeedConfig()) == native


@pytest.mark.parametrize(("losses", "difference"), [([4.0, 2.0], 0.0), ([4.0, 2.1], 0.05), ([4.0, math.nan], math.nan)])
def test_a_run_is_held_against_the_native_one(losses, difference):
    native = Curve([4.0, 2.0], [1.0, 0.5], 0.0)
    row = engines.compare(CONTENDERS[0], "rectified", "adapprox", replace(native, losses=losses), native)
    assert row["loss_difference"] == pytest.approx(difference, nan_ok=True)
    assert row["engine"] == "deepspeed, ZeRO 0" and row["layout"] == "EP2xDP2"
    met = engines.goal("rectified", "adapprox", [row]).met
    assert met == (losses == native.losses)


def test_a_run_of_another_router_or_optimizer_does_not_count_for_a_goal():
    native = Curve([4.0, 2.0], [1.0, 0.5], 0.0)
    rows = [
        engines.compare(CONTENDERS[0], "dropless", "adamw", replace(native, losses=[4.0, 3.0]), native),
        engines.compare(CONTENDERS[0], "rectified", "adapprox", native, native),
    ]
    assert engines.goal("rectified", "adapprox", rows).met
    assert not engines.goal("dropless", "adamw", rows).met
