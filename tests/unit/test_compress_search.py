"""Plans judged without being applied, redundancy found where it was planted, and searches within a budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from stock_models import CONFIGS
from transformers import AutoModelForCausalLM

from wastenot.moe.compress.calibration import Calibration, packed
from wastenot.moe.compress.choose import drop_blocks, drop_experts, drop_layers, empty_plan
from wastenot.moe.compress.cost import LayerSeconds, bytes_of, parameters_of, seconds_of, time_layers
from wastenot.moe.compress.evaluate import Evaluator
from wastenot.moe.compress.plan import DropPlan, Quantize, Shape
from wastenot.moe.compress.profile import Profile, ProfileConfig, measure
from wastenot.moe.compress.search import Options, Target, search
from wastenot.moe.compress.stock import StockModel

LAYERS = 6


def saved(family: str, folder, change=None):
    """A tiny model of `family` with visible layers, and where it is saved."""
    torch.manual_seed(5)
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), "num_hidden_layers": LAYERS})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
        if change is not None:
            change(model)
    model.save_pretrained(folder)
    return model.eval()


def text(seed: int = 0) -> Calibration:
    tokens = torch.randint(0, 64, (600,), generator=torch.Generator().manual_seed(seed))
    return packed(tokens, 20, 10, "random")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "mixtral"
    return saved("mixtral", folder), folder


def plan_of(model: StockModel, **fields) -> DropPlan:
    return DropPlan(base=model.fingerprint, shape=model.shape, **fields)


def test_quality_is_that_of_the_stock_models_own_logits(mixtral):
    stock, folder = mixtral
    judge = Evaluator(StockModel(folder), text(), batch=3)
    with torch.no_grad():
        logits = stock(text().tokens_NS).logits[:, :-1].flatten(0, 1).double()
    targets = text().tokens_NS[:, 1:].flatten()
    assert judge.whole.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert judge.whole.accuracy == pytest.approx((logits.argmax(-1) == targets).double().mean().item())
    assert judge.whole.kl == 0 and judge.whole.tokens == 10 * 19

    skipped = type(stock)(replace_layers(stock, gone=2))
    skipped.load_state_dict({renamed(name, 2): w for name, w in stock.state_dict().items() if not in_layer(name, 2)})
    with torch.no_grad():
        shorter = skipped.eval()(text().tokens_NS).logits[:, :-1].flatten(0, 1).double()
    found = judge.quality(plan_of(judge.model, blocks=(2,)))
    assert found.loss == pytest.approx(F.cross_entropy(shorter, targets).item(), rel=1e-6)
    kl = F.kl_div(shorter.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    assert found.kl == pytest.approx(kl.item(), rel=1e-5)


def replace_layers(stock, gone: int):
    config = type(stock.config)(**{**stock.config.to_dict(), "num_hidden_layers": LAYERS - 1})
    assert 0 <= gone < LAYERS
    return config


def in_layer(name: str, layer: int) -> bool:
    return name.startswith(f"model.layers.{layer}.")


def renamed(name: str, gone: int) -> str:
    if not name.startswith("model.layers."):
        return name
    number, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"model.layers.{int(number) - (int(number) > gone)}.{rest}"


def test_where_the_evaluator_stands_changes_no_judgement(mixtral):
    model = StockModel(mixtral[1])
    plans = [
        plan_of(model, blocks=(1,)),
        plan_of(model, layers=(4,)),
        plan_of(model, experts={3: (0, 5)}, order={3: (4, 1, 2, 3)}),
        plan_of(model, blocks=(0, 5), layers=(2,)),
        plan_of(model),
    ]
    fresh = [Evaluator(model, text()).quality(plan) for plan in plans]
    judge = Evaluator(model, text())
    for stand in plans:
        judge.stand_at(stand)
        assert [judge.quality(plan) for plan in plans] == fresh


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_layers_that_add_nothing_are_found(family, tmp_path):
    """Planted: what layers 2 and 4 of the mixture add is next to nothing."""

    def quiet(model):
        for layer in (2, 4):
            model.model.layers[layer].post_attention_layernorm.weight.mul_(1e-4)

    saved(family, tmp_path / "model", quiet)
    model = StockModel(tmp_path / "model")
    profile = measure(model, text(), ProfileConfig(window=2))
    assert drop_layers(empty_plan(profile), profile, 2).layers == (2, 4)
    assert drop_layers(empty_plan(profile), profile, 1).layers in ((2,), (4,))


def test_blocks_that_add_nothing_are_found(tmp_path):
    def quiet(model):
        for layer in (3, 4):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(1e-4)
            model.model.layers[layer].post_attention_layernorm.weight.mul_(1e-4)

    saved("mixtral", tmp_path / "model", quiet)
    profile = measure(StockModel(tmp_path / "model"), text(), ProfileConfig(window=2))
    assert drop_blocks(empty_plan(profile), profile, 2).blocks == (3, 4)
    assert drop_blocks(empty_plan(profile), profile, 2, "consecutive").blocks == (3, 4)


@pytest.mark.parametrize("criterion", ["mass", "gate", "frequency"])
def test_experts_that_are_hardly_chosen_are_found(criterion, tmp_path):
    """Planted: rows of the router that point away from every token."""

    def unloved(model):
        # The stream stays near the embedding, whose elements are all positive.
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.mlp.experts.down_proj.mul_(1e-4)
        for layer, experts in ((1, (0, 3)), (2, (1, 5))):
            model.model.layers[layer].mlp.gate.weight[list(experts)] = -1.0

    saved("mixtral", tmp_path / "model", unloved)
    profile = measure(StockModel(tmp_path / "model"), text(), ProfileConfig())
    plan = drop_experts(empty_plan(profile), profile, 4, criterion)
    assert (plan.experts[1], plan.experts[2]) == ((0, 3), (1, 5))


@pytest.mark.parametrize("criterion", ["reap", "msan"])
def test_experts_that_say_nothing_are_found(criterion, tmp_path):
    def silent(model):
        for layer, experts in ((1, (0, 3)), (2, (1, 5))):
            model.model.layers[layer].mlp.experts.down_proj[list(experts)] *= 1e-4

    saved("mixtral", tmp_path / "model", silent)
    profile = measure(StockModel(tmp_path / "model"), text(), ProfileConfig())
    plan = drop_experts(empty_plan(profile), profile, 4, criterion)
    assert (plan.experts[1], plan.experts[2]) == ((0, 3), (1, 5))


def rescoring(model: StockModel):
    def rescore(plan: DropPlan) -> Profile:
        return measure(model, text(), ProfileConfig(), plan=plan)

    return rescore


def test_a_profile_under_a_plan_is_that_of_the_smaller_model(mixtral, tmp_path):
    stock, folder = mixtral
    plan = plan_of(StockModel(folder), blocks=(2,))
    under = measure(StockModel(folder), text(), ProfileConfig(window=2), plan=plan)
    skipped = type(stock)(replace_layers(stock, gone=2))
    skipped.load_state_dict({renamed(name, 2): w for name, w in stock.state_dict().items() if not in_layer(name, 2)})
    skipped.save_pretrained(tmp_path / "smaller")
    alone = measure(StockModel(tmp_path / "smaller"), text(), ProfileConfig(window=2))
    left = [layer for layer in range(LAYERS) if layer != 2]
    for old, sums in zip(left, alone.layers, strict=True):
        for name, value in sums.items():
            torch.testing.assert_close(under.layers[old][name], value, rtol=1e-6, atol=1e-9)
    assert not under.layers[2]


def test_a_search_ends_within_the_budget_and_each_step_is_the_least_harm_for_what_it_saves(mixtral):
    model = StockModel(mixtral[1])
    plan = plan_of(model)
    judge = Evaluator(model, text(1))
    whole = parameters_of(plan, model)
    target = Target("params", lambda plan: parameters_of(plan, model), most=0.6 * whole)
    options = Options(each=2)
    steps = list(search(plan, judge, rescoring(model), target, options))
    assert steps[0].plan == plan and steps[-1].cost <= 0.6 * whole < steps[-2].cost
    for before, after in pairwise(steps):
        tried = list(options.of(before.plan, rescoring(model)(before.plan)))
        harm = {
            option.hash: (judge.quality(option).kl - before.quality.kl) / (before.cost - target.cost(option))
            for option in tried
        }
        assert after.plan.hash == min(harm, key=lambda key: harm[key])
        assert after.tried == len(tried)


def test_a_search_by_kl_stops_before_it_is_exceeded(mixtral):
    model = StockModel(mixtral[1])
    plan, judge = plan_of(model), Evaluator(model, text(1))
    limit = 2.5 * min(judge.quality(plan_of(model, layers=(n,))).kl for n in range(LAYERS))
    target = Target("kl", lambda plan: parameters_of(plan, model), kl=limit)
    steps = list(search(plan, judge, rescoring(model), target, Options(kinds=("layers",))))
    assert len(steps) > 1
    assert all(step.quality.kl <= limit for step in steps)


def test_a_budget_that_nothing_reaches_says_what_is_left(mixtral):
    model = StockModel(mixtral[1])
    target = Target("params", lambda plan: parameters_of(plan, model), most=10.0)
    with pytest.raises(ValueError, match="params: 10 cannot be reached; with all drops that are possible"):
        list(search(plan_of(model), Evaluator(model, text()), rescoring(model), target, Options(each=1)))


def test_what_a_plan_costs_is_what_is_stored(mixtral):
    stock, folder = mixtral
    model = StockModel(folder)
    plan = plan_of(model)
    assert parameters_of(plan, model) == sum(parameter.numel() for parameter in stock.parameters())
    assert bytes_of(plan, model) == 4 * parameters_of(plan, model)
    mlp = stock.model.layers[1].mlp
    of_mlp = sum(p.numel() for p in mlp.parameters()) + stock.model.layers[1].post_attention_layernorm.weight.numel()
    assert parameters_of(plan_of(model, layers=(1,)), model) == parameters_of(plan, model) - of_mlp
    expert = (mlp.experts.gate_up_proj[0].numel() + mlp.experts.down_proj[0].numel()) + mlp.gate.weight[0].numel()
    assert parameters_of(plan_of(model, experts={1: (0, 2)}), model) == parameters_of(plan, model) - 2 * expert
    in_4_bits = bytes_of(replace(plan, quantize=Quantize(bits=4, group=16)), model)
    assert 4 * model.outside_size < in_4_bits < bytes_of(plan, model) / 3


TWO = Shape(experts=(4, 4), top_k=2)


def test_steps_are_as_long_as_the_layers_that_are_left():
    layers = [LayerSeconds(1.0, 2.0), LayerSeconds(1.5, 3.0)]
    assert seconds_of(DropPlan(base="x", shape=TWO), layers) == 7.5
    assert seconds_of(DropPlan(base="x", shape=TWO, layers=(1,)), layers) == 4.5
    assert seconds_of(DropPlan(base="x", shape=TWO, blocks=(0,)), layers) == 4.5


def test_every_layer_is_timed(mixtral):
    seconds = time_layers(StockModel(mixtral[1]), text(), rounds=1)
    assert len(seconds) == LAYERS
    assert all(layer.attention > 0 and layer.feed > 0 for layer in seconds)
