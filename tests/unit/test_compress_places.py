"""Which part of a model each tensor is: the tables of families against what transformers itself writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from stock_models import CONFIGS, save_stock
from transformers import AutoConfig

from wastenot.moe.compress.places import FAMILIES, NATIVE, Place, family_of, name_of, place_of, places_of
from wastenot.moe.compress.shapes import shape_of_config, shape_of_model
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import Decoder
from wastenot.parallel.mesh import single

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("stock")
    return {family: save_stock(family, home / family) for family in CONFIGS}


def names_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_there_is_a_case_of_every_family() -> None:
    assert tuple(CONFIGS) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_that_transformers_writes_has_a_place_and_its_name_back(
    stock: dict[str, Path], family: str
) -> None:
    shape = shape_of_config(json.loads((stock[family] / "config.json").read_text()))
    places = places_of(names_in(stock[family]), family, shape.layers)
    for name, place in places.items():
        assert name_of(place, family) == name
        assert place_of(name, family, shape.layers) == place
    for layer, count in enumerate(shape.experts):
        inside = [place for place in places.values() if place.layer == layer]
        assert {place.expert for place in inside if place.part == "expert"} == set(range(count))
        assert sum(place.part == "router" for place in inside) == (count > 0)
        assert any(place.part == "dense" for place in inside) == (layer in shape.dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_d2_routers_and_gates_are_never_expert_weights(stock: dict[str, Path], family: str) -> None:
    """The public code takes what has `gate.` in its name for no linear layer of an expert: names end in `gate`."""
    names = names_in(stock[family])
    places = places_of(names, family, 3)
    gates = [name for name in names if name.split(".")[-2] in ("gate", "shared_expert_gate")]
    assert gates
    assert all(places[name].part in ("router", "router_bias", "shared") for name in gates)
    assert not any(places[name].is_linear for name in gates)
    linear = {name.split(".")[-2] for name in names if places[name].part == "expert" and places[name].is_linear}
    assert linear == ({"w1", "w2", "w3"} if family == "mixtral" else {"gate_proj", "up_proj", "down_proj"})


def test_every_tensor_of_a_run_has_a_place_and_its_name_back() -> None:
    moe = MoEConfig(experts=4, d_expert=16, shared_experts=1, first_dense=1)
    config = ModelConfig(vocab_size=32, d_model=16, layers=3, heads=2, qk_norm="head", moe=moe)
    with torch.device("meta"):
        model = Decoder(config, RouterConfig(), single())
    names = [f"model.{name}" for name in model.state_dict()]
    places = places_of(names, NATIVE, 3)
    assert [name_of(place, NATIVE) for place in places.values()] == names
    assert places["model.blocks.1.ffn.router.weight"] == Place(1, "router", "router")
    assert places["model.blocks.1.ffn.router.bias_E"].part == "router_bias"
    assert places["model.blocks.2.ffn.experts.down"] == Place(2, "experts", "down", leaf="")
    assert places["model.blocks.2.ffn.experts.down"].is_linear
    assert not places["model.blocks.1.ffn.router.weight"].is_linear
    assert places["model.blocks.0.ffn.gate.weight"].part == "dense"
    assert places["model.blocks.1.ffn.shared.gate.weight"].part == "shared"


def test_a_place_has_a_name_in_other_families() -> None:
    place = place_of("model.layers.3.mlp.experts.5.down_proj.weight", "qwen3_moe", 48)
    assert place == Place(layer=3, part="expert", weight="down", expert=5)
    assert name_of(place, "mixtral") == "model.layers.3.block_sparse_moe.experts.5.w2.weight"
    with pytest.raises(ValueError, match="mixtral family have no dense gate weight"):
        name_of(Place(0, "dense", "gate"), "mixtral")


def test_unknown_names_are_listed_and_never_kept() -> None:
    names = ["model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gates.weight", "model.layers.9.mlp.gate.weight"]
    with pytest.raises(ValueError, match=r"mlp\.gates\.weight, model\.layers\.9\.mlp\.gate\.weight; remove"):
        places_of(names, "olmoe", 2)
    with pytest.raises(ValueError, match="and 2 more"):
        places_of([f"blob.{i}" for i in range(10)], "olmoe", 2)


def test_layers_behind_the_last_predict_further_tokens() -> None:
    for rest in (
        "eh_proj.weight",
        "shared_head.norm.weight",
        "mlp.experts.7.up_proj.weight",
        "self_attn.o_proj.weight",
    ):
        place = place_of(f"model.layers.61.{rest}", "deepseek_v3", 61)
        assert (place.layer, place.part) == (61, "next_n")
        assert name_of(replace(place, layer=40), "deepseek_v3") == f"model.layers.40.{rest}"
    with pytest.raises(ValueError, match="deepseek_v2"):
        place_of("model.layers.61.mlp.gate.weight", "deepseek_v2", 61)


@given(st.text(alphabet="gate.uprojx0123_experts", max_size=30))
def test_any_name_has_its_place_or_is_refused(rest: str) -> None:
    name = f"model.layers.0.{rest}"
    try:
        place = place_of(name, "qwen2_moe", 1)
    except ValueError:
        return
    assert name_of(place, "qwen2_moe") == name


def test_families_that_are_not_supported_are_named_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'glm4_moe' cannot be compressed; supported are mixtral, .*deepseek_v3$"):
        family_of({"model_type": "glm4_moe"})


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_that_transformers_builds(stock: dict[str, Path], family: str) -> None:
    """Also under the keys that the other major version of transformers writes."""
    config = json.loads((stock[family] / "config.json").read_text())
    theirs = AutoConfig.for_model(**config)
    shape = shape_of_config(config)
    assert shape.layers == theirs.num_hidden_layers
    assert max(shape.experts) == (theirs.n_routed_experts if family == "deepseek_v3" else theirs.num_experts)
    assert shape.top_k == theirs.num_experts_per_tok
    count = config.pop(next(key for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config))
    assert shape_of_config(config | {"num_experts": count}) == shape


def test_layers_without_experts_are_found_in_every_form() -> None:
    qwen = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "num_experts": 8}
    listed = shape_of_config(qwen | {"mlp_only_layers": [1], "decoder_sparse_step": 2})
    assert (listed.experts, listed.dense) == ((0, 0, 0, 8, 0, 8), (0, 1, 2, 4))
    deepseek = {"model_type": "deepseek_v3", "num_hidden_layers": 5, "n_routed_experts": 16}
    plain = shape_of_config(deepseek)
    assert (plain.dense, plain.groups, plain.top_groups, plain.top_k) == ((0, 1, 2), 8, 4, 8)
    second = deepseek | {"model_type": "deepseek_v2", "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
    assert shape_of_config(second | {"topk_method": "greedy"}).groups == 1
    assert shape_of_config(second | {"topk_method": "group_limited_greedy"}).groups == 4


def test_shape_of_a_run_counts_layer_by_layer() -> None:
    moe = MoEConfig(experts=4, d_expert=8, per_layer=(0, 4, 0, 3), dense=(0,))
    shape = shape_of_model(ModelConfig(d_model=8, heads=1, layers=4, moe=moe), RouterConfig(groups=1, top_k=2))
    assert (shape.experts, shape.dense, shape.top_k) == ((0, 4, 0, 3), (0,), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts: missing"),
        ({"num_experts": "many"}, "num_experts: 'many' is no whole number"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: 3 is no list"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2"),
    ],
)
def test_configurations_that_say_too_little_are_refused(changes: dict[str, object], message: str) -> None:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "num_experts": 8}
    with pytest.raises(ValueError, match=message):
        shape_of_config(config | changes)


def test_tables_load_without_torch() -> None:
    code = (
        "import sys\n"
        "import wastenot.moe.compress.places, wastenot.moe.compress.shapes, wastenot.moe.compress.plan\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
