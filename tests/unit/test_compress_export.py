"""Exports: stock transformers loads them whole and computes what the base does without what was dropped.

The base is bypassed by hooks, never by taking it apart, so that the two share nothing but weights. What stock loaders
do with a wrong folder is asserted beside what is refused.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import CONFIGS, save_stock
from torch import Tensor
from transformers import AutoModelForCausalLM

from wastenot.launch.compressed_run import apply_plan as apply_to_run
from wastenot.launch.config import DataConfig, LogConfig, TrainConfig
from wastenot.launch.saved_run import write_run
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.compress import export as export_module
from wastenot.moe.compress import stock_forward
from wastenot.moe.compress import verify as verify_module
from wastenot.moe.compress.apply import apply_plan
from wastenot.moe.compress.change import weight_change
from wastenot.moe.compress.export import Exported, export
from wastenot.moe.compress.export_source import from_decoder, open_folder
from wastenot.moe.compress.fingerprint import checkpoint_fingerprint
from wastenot.moe.compress.partial import Partial
from wastenot.moe.compress.plan import DropPlan, Quantize
from wastenot.moe.compress.shapes import shape_of_model
from wastenot.moe.compress.stored import read_stock
from wastenot.moe.compress.verify import TOLERANCE, verify
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.parallel.mesh import single
from wastenot.tools.cli import main
from wastenot.tools.compress.verify import dropless_logits, verified

pytestmark = pytest.mark.usefixtures("one_thread")

CASES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {
        "mlp_only_layers": [],
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 5,
        "layer_types": None,
    },
    "qwen3_moe": {"decoder_sparse_step": 2},
    "qwen3_moe-plain": {"intermediate_size": 640},
    "olmoe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
}

Base = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    """The stock checkpoint of a case, six layers deep, written once."""
    root = tmp_path_factory.mktemp("stock")

    def of(case: str) -> Path:
        folder = root / case
        if not folder.exists():
            changes = {"num_hidden_layers": 6, "layer_types": None} | CASES[case]
            save_stock(case.partition("-")[0], folder, max_shard_size="20KB", **changes)
            for path in folder.glob("*.safetensors"):
                # So that what layers add is as large as what they add it to.
                tensors = {name: tensor + 1 * ("norm" in name) for name, tensor in load_file(path).items()}
                save_file(tensors, path, {"format": "pt"})
            (folder / "tokenizer.json").write_text("{}")
        return folder

    return of


@pytest.fixture
def here(monkeypatch) -> None:
    """What `verify` asks of another process is answered in this one: the same code, without importing it anew."""

    def ask(orders: list[dict[str, Any]], python: str) -> list[dict[str, Any]]:
        return [json.loads(json.dumps(stock_forward.answered(json.loads(json.dumps(order))))) for order in orders]

    monkeypatch.setattr(verify_module, "ask", ask)


def applied(base: Path, folder: Path, **drops: Any) -> Path:
    """What a plan leaves of the stock checkpoint `base`."""
    apply_plan(base, folder, DropPlan(base=checkpoint_fingerprint(base), shape=read_stock(base).shape, **drops))
    return folder


def exported(base: Path, folder: Path, drops: dict[str, Any], **how: Any) -> Exported:
    """The same, exported to `folder`/exported."""
    return export(open_folder(applied(base, folder / "applied", **drops)), folder / "exported", **how)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def experts_gone(base: Path, gone: tuple[int, ...], but: tuple[int, ...] = ()) -> dict[int, tuple[int, ...]]:
    return {layer: gone for layer in read_stock(base).shape.moe_layers if layer not in but}


BLOCKS = {"blocks": (0, 3)}
"""Among them a dense first block, an odd one that breaks every rhythm, and a window layer."""
LAYERS = {"layers": (1,)}
FIRST = {"blocks": (0,), "layers": (1,)}
DENSE = {"layers": (0, 1)}
"""A dense network goes too."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["nothing", "blocks", "layers", "experts", "all"])
def test_export_is_the_base_with_what_was_dropped_bypassed(case, what, base, here, tmp_path):
    stock = base(case)
    drops: dict[str, Any] = {
        "nothing": {},
        "blocks": BLOCKS,
        "layers": DENSE if read_stock(stock).shape.dense else LAYERS,
        "experts": {"experts": experts_gone(stock, (2, 5))},
        "all": FIRST | {"experts": experts_gone(stock, (0, 5), but=(0, 1))},
    }[what]
    done = exported(stock, tmp_path, drops, allow_zeroed=case == "olmoe", shard_bytes=20_000)
    found = verify(tmp_path / "exported", against=stock)
    assert found.problems == ()
    # A router with fewer rows rounds otherwise.
    assert found.difference <= found.allowed == (TOLERANCE if what in ("experts", "all") else 0.0)
    assert (found.parameters, found.bytes) == (done.parameters, done.bytes)
    if what not in ("nothing", "layers"):
        assert found.parameters < found.base_parameters


def test_what_is_dropped_matters(base, here, tmp_path):
    """Of the test above: without its hooks it would fail."""
    stock = base("qwen3_moe")
    exported(stock, tmp_path, LAYERS)
    order = {"folder": str(stock), "tokens": [[1, 2, 3, 4]], "generate": 0, "experts": {}, "silent": {}, "blocks": []}
    logits = []
    for feeds in ([], [1]):
        path = tmp_path / f"{feeds}.safetensors"
        stock_forward.answered(order | {"feeds": feeds, "logits": str(path)})
        logits.append(load_file(path)["logits"])
    assert (logits[0] - logits[1]).abs().max() > 0.1 * logits[0].abs().max()


def test_mixtral_without_experts_in_a_layer_is_smaller_as_qwen2_moe(base, here, tmp_path):
    stock = base("mixtral")
    done = exported(stock, tmp_path, {"layers": (1, 4)})
    assert (done.family, done.stubs, done.width) == ("qwen2_moe", (1, 4), 8)
    assert config_of(tmp_path / "exported")["mlp_only_layers"] == [1, 4]
    found = verify(tmp_path / "exported", against=stock)
    assert found.problems == () and found.difference == 0.0
    # Two layers of six experts, each as large as the stub; four shared experts of zeros.
    assert found.parameters < found.base_parameters


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe-plain", "deepseek_v3"])
def test_no_layer_needs_experts_where_the_family_can_say_so(case, base, here, tmp_path):
    done = exported(base(case), tmp_path, {"layers": tuple(range(6))})
    assert done.stubs == (0, 1, 2, 3, 4, 5)
    found = verify(tmp_path / "exported", against=base(case))
    assert found.problems == () and found.difference == 0.0
    assert found.parameters < found.base_parameters


def test_stub_is_as_wide_as_the_dense_layers_there_are_or_as_asked(base, tmp_path):
    assert exported(base("qwen3_moe"), tmp_path / "a", LAYERS).width == 24
    assert exported(base("qwen3_moe-plain"), tmp_path / "b", LAYERS).width == 8
    assert exported(base("qwen3_moe-plain"), tmp_path / "c", LAYERS, stub_width=128).width == 128
    # No layer is dense any more once these are gone.
    assert exported(base("deepseek_v2"), tmp_path / "d", FIRST, stub_width=3).width == 3
    assert config_of(tmp_path / "d" / "exported")["intermediate_size"] == 3
    with pytest.raises(ValueError, match="stub_width: 0 is too small"):
        exported(base("qwen3_moe-plain"), tmp_path / "e", LAYERS, stub_width=0)


def test_experts_in_another_order_compute_the_same(base, here, tmp_path):
    stock = base("qwen3_moe-plain")
    exported(stock, tmp_path, {"experts": dict.fromkeys(range(6), (1, 4)), "order": {2: (5, 0, 3, 2)}})
    found = verify(tmp_path / "exported", against=stock)
    assert found.problems == ()
    assert found.allowed == TOLERANCE and found.difference <= TOLERANCE


def test_skipped_experts_are_zeros_that_routers_still_choose(base, here, tmp_path):
    stock = base("mixtral")
    drops = {"experts": {1: (0, 4), 3: (2,)}, "semantics": "skip"}
    exported(stock, tmp_path, drops)
    found = verify(tmp_path / "exported", against=stock)
    assert found.problems == () and found.difference == 0.0
    assert found.parameters == found.base_parameters


@pytest.mark.parametrize(
    ("case", "layers", "says"),
    [
        (
            "olmoe",
            (2,),
            "layers [2] of the base .* the olmoe family have some in all.*whole blocks.*--allow-zeroed",
        ),
        ("deepseek_v2", (3, 4), r"only the first layers .* experts of layers \[1, 2\], or layers \[3, 4\] as whole"),
        ("deepseek_v3", (3,), r"only the first layers .* experts of layers \[1\], or layers \[3\] as whole"),
    ],
)
def test_layer_drop_a_family_cannot_say_is_refused_or_zeroed(case, layers, says, base, here, tmp_path):
    stock = base(case)
    with pytest.raises(ValueError, match=says.replace("[2]", r"\[2\]")):
        exported(stock, tmp_path / "refused", {"layers": layers})
    assert not (tmp_path / "refused" / "exported").exists()
    done = exported(stock, tmp_path, {"layers": layers}, allow_zeroed=True)
    assert (done.zeroed, done.stubs) == (layers, ())
    found = verify(tmp_path / "exported", against=stock)
    assert found.problems == () and found.difference == 0.0
    assert found.parameters == found.base_parameters


def test_a_dense_layer_among_those_with_experts_is_refused(base, tmp_path):
    """A compressed folder that says so, where the family cannot."""
    folder = applied(base("deepseek_v2"), tmp_path / "applied", layers=(3,))
    said = json.loads((folder / "compressed.json").read_text())
    said["shape"]["dense"] = [0, 3]
    (folder / "compressed.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"layers \[3\] are dense, which no deepseek_v2 model can say"):
        export(open_folder(folder), tmp_path / "exported")


def test_zeroed_layers_need_one_that_is_not(base, tmp_path):
    with pytest.raises(ValueError, match="no layer has experts any more"):
        exported(base("olmoe"), tmp_path, {"layers": tuple(range(6))}, allow_zeroed=True)


def test_b1_omitted_experts_load_at_random_and_are_refused(base, here, tmp_path):
    """Layer Drop by leaving tensors out."""
    stock = base("qwen3_moe-plain")
    left = {name: tensor for name, tensor in tensors_of(stock).items() if not name.startswith("model.layers.1.mlp.")}
    folder = write_folder(tmp_path / "wrong", config_of(stock), left)
    _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert loading["missing_keys"]
    with pytest.raises(ValueError, match=r"layer 1 lacks .*expert"):
        export(open_folder(folder), tmp_path / "exported")
    assert any(problem.startswith("missing (") for problem in verify(folder).problems)


def test_c2_listed_expert_counts_do_not_load_and_are_refused(base, tmp_path):
    """The public code's format: a list where stock models have one number."""
    stock = base("qwen3_moe-plain")
    config = config_of(stock) | {"num_experts": [6, 6, 6, 6, 6, 6], "num_local_experts": [6, 6, 6, 6, 6, 6]}
    folder = write_folder(tmp_path / "wrong", config, tensors_of(stock))
    with pytest.raises(Exception, match=r".") as loading:
        AutoModelForCausalLM.from_pretrained(folder)
    assert loading.type is not AssertionError
    with pytest.raises(ValueError, match=r"num_experts: \[6, 6, 6, 6, 6, 6\] is no whole number"):
        open_folder(folder)


def test_c3_unequal_expert_counts_do_not_load_and_are_refused(base, tmp_path):
    stock = base("mixtral")
    drops = {"experts": {1: (0, 1), 3: (2,)}}
    folder = applied(stock, tmp_path / "applied", **drops)
    wrong = write_folder(tmp_path / "wrong", config_of(stock), tensors_of(folder))
    with pytest.raises(Exception, match=r".") as loading:
        AutoModelForCausalLM.from_pretrained(wrong)
    assert loading.type is not AssertionError
    with pytest.raises(ValueError, match=r"4 to 6 experts.*nearest plan keeps 6 in each of the 6 layers.* to 4"):
        export(open_folder(folder), tmp_path / "exported")
    with pytest.raises(ValueError, match="layer 1 lacks"):
        export(open_folder(wrong), tmp_path / "exported")


def test_d1_per_layer_config_is_ignored_by_stock_models_and_is_refused(base, tmp_path):
    stock = base("qwen3_moe-plain")
    left = {name: tensor for name, tensor in tensors_of(stock).items() if not name.startswith("model.layers.1.mlp.")}
    config = config_of(stock) | {"per_layer_config": {"1": {"skip": ["mlp"]}}}
    folder = write_folder(tmp_path / "wrong", config, left)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert any(name.startswith("model.layers.1.mlp.") for name in loading["missing_keys"])
    assert model.model.layers[1].mlp.experts.gate_up_proj.any()
    with pytest.raises(ValueError, match=r"per_layer_config: .* changes no module of stock models"):
        open_folder(folder)


def test_d11_block_drop_rewrites_every_field_that_counts_or_lists_layers(base, here, tmp_path):
    """REF leaves first_k_dense_replace, mlp_only_layers and their like as they were."""
    exported(base("deepseek_v3"), tmp_path / "a", BLOCKS)
    config = config_of(tmp_path / "a" / "exported")
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (4, 0)
    assert config["num_nextn_predict_layers"] == 0
    exported(base("qwen3_moe"), tmp_path / "b", {"blocks": (1, 2)})
    config = config_of(tmp_path / "b" / "exported")
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [0, 2])
    exported(base("qwen2_moe"), tmp_path / "c", {"blocks": (1, 2)})
    config = config_of(tmp_path / "c" / "exported")
    sliding, full = "sliding_attention", "full_attention"
    # Of the base: layers 0, 2 and 4 have a window.
    assert config["layer_types"] == [sliding, full, sliding, full]
    assert config["max_window_layers"] == 3
    # What a stale value does: dense layer 0 went, and layer 1 is read as a dense one.
    stale = config_of(tmp_path / "a" / "exported") | {"first_k_dense_replace": 1}
    folder = write_folder(tmp_path / "stale", stale, tensors_of(tmp_path / "a" / "exported"))
    problems = verify(folder).problems
    assert any(problem.startswith("missing") for problem in problems)
    assert any(problem.startswith("unexpected") for problem in problems)


def test_both_versions_of_transformers_find_experts_and_theta(base, tmp_path):
    """Only one of the keys that 4 and 5 read is in what 5 writes."""
    exported(base("qwen3_moe-plain"), tmp_path, {"experts": dict.fromkeys(range(6), (0,))})
    config = config_of(tmp_path / "exported")
    assert config["num_experts"] == config["num_local_experts"] == 5
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_next_token_layers_and_rotary_frequencies_stay_behind(base, here, tmp_path):
    stock = base("deepseek_v3")
    more = {
        "model.layers.6.enorm.weight": torch.ones(16),
        "model.layers.6.eh_proj.weight": torch.ones(16, 32),
        "model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    config = config_of(stock) | {"num_nextn_predict_layers": 1, "auto_map": {"AutoModel": "modeling.Own"}}
    folder = write_folder(tmp_path / "with", config, tensors_of(stock) | more)
    exported(folder, tmp_path, BLOCKS)
    assert "auto_map" not in config_of(tmp_path / "exported")
    assert verify(tmp_path / "exported", against=stock).problems == ()


def test_vllm_gets_the_biases_it_always_reads(base, here, tmp_path):
    """Its Qwen2-MoE has biases whatever qkv_bias says, and no width of heads."""
    stock = base("mixtral")
    exported(stock, tmp_path, LAYERS, loader="vllm")
    assert config_of(tmp_path / "exported")["qkv_bias"] is True
    assert not tensors_of(tmp_path / "exported")["model.layers.0.self_attn.q_proj.bias"].any()
    found = verify(tmp_path / "exported", against=stock)
    assert found.problems == () and found.difference == 0.0
    save_stock("mixtral", tmp_path / "narrow", head_dim=4)
    with pytest.raises(ValueError, match=r"heads of width 4; .*hidden_size / num_attention_heads"):
        exported(tmp_path / "narrow", tmp_path / "heads", LAYERS, loader="vllm")


def test_a_window_stays_with_its_family(here, tmp_path):
    """Of Qwen2-MoE's, transformers 4 makes another one with a cache, and vLLM none."""
    stock = save_stock("mixtral", tmp_path / "stock", sliding_window=6, num_hidden_layers=4)
    exported(stock, tmp_path, BLOCKS)
    found = verify(tmp_path / "exported", against=stock)
    assert found.problems == () and found.difference == 0.0
    with pytest.raises(ValueError, match=r"sliding_window: 6; .* Drop whole blocks instead"):
        exported(stock, tmp_path / "layers", LAYERS)


WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
}
"""Widths that groups of 32 divide."""


def in_few_bits(family: str, bits: int, folder: Path, **drops: Any) -> Path:
    """A stock model, cut and quantized: the compressed folder, beside the stock one."""
    known = CONFIGS[family].to_dict()
    sizes: dict[str, Any] = {key: value for key, value in WIDE.items() if key in known} | {"layer_types": None}
    stock = save_stock(family, folder / "stock", num_hidden_layers=4, **sizes)
    how = Quantize(bits=bits)
    plan = DropPlan(base=checkpoint_fingerprint(stock), shape=read_stock(stock).shape, quantize=how, **drops)
    apply_plan(stock, folder / "applied", plan, transform=weight_change(plan))
    return folder / "applied"


def test_few_bits_stay_few_and_what_is_whole_is_named(tmp_path):
    done = export(open_folder(in_few_bits("mixtral", 4, tmp_path, layers=(0,))), tmp_path / "exported")
    config, tensors = config_of(tmp_path / "exported"), tensors_of(tmp_path / "exported")
    assert not any(name.endswith((".q", ".scale")) for name in tensors)
    assert "model.layers.1.mlp.experts.3.down_proj.weight_packed" in tensors
    whole = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dim() == 2}
    whole = {name for name in whole if not name.endswith(("_packed", "_scale")) and "embed" not in name}
    assert {*config["quantization_config"]["ignore"]} == whole
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate"} <= whole
    assert done.bytes < 2 * done.parameters


def test_experts_of_zeros_among_few_bits_are_refused(tmp_path):
    folder = in_few_bits("olmoe", 8, tmp_path, layers=(1,))
    with pytest.raises(ValueError, match=r"layers \[1\] would have experts of zeros, and others are in few bits"):
        export(open_folder(folder), tmp_path / "exported", allow_zeroed=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_cut_and_in_few_bits_loads_as_the_weights_that_the_codes_stand_for(family, bits, here, tmp_path):
    layers = {} if family == "olmoe" else {"layers": (0,)}
    folder = in_few_bits(family, bits, tmp_path, blocks=(3,), **layers)
    done = export(open_folder(folder), tmp_path / "exported")
    found = verified(tmp_path / "exported", folder)
    assert (found["parameters"], found["bytes"]) == (done.parameters, done.bytes)
    with pytest.raises(ValueError, match="has whole weights, and the export few bits"):
        verify(tmp_path / "exported", against=tmp_path / "stock")


def test_groups_too_small_for_the_stock_router_are_refused(tmp_path):
    """DeepSeek-V3's adds up the best two of each group."""
    stock = save_stock("deepseek_v3", tmp_path / "stock", topk_group=2)
    with pytest.raises(ValueError, match=r"2 experts in 2 groups are too few .*keeps 4 in each layer"):
        exported(stock, tmp_path, {"experts": dict.fromkeys((1, 2), (0, 1, 2, 4, 5, 6))})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config, tensors: config.update(quantization_config={"bits": 4}), "quantization_config"),
        (
            lambda config, tensors: tensors.update({"model.layers.1.mlp.shared.weight": torch.ones(1)}),
            "no tensors of a",
        ),
        (lambda config, tensors: tensors.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda config, tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda config, tensors: tensors.pop("model.layers.3.self_attn.k_norm.weight"), "layers 0 and 3 differ"),
        (lambda config, tensors: tensors.pop("model.layers.3.mlp.experts.4.up_proj.weight"), "layer 3 lacks .*expert"),
        (lambda config, tensors: config.update(layer_types=["full_attention"] * 5), "5 entries for 6 layers"),
        (lambda config, tensors: config.update(mlp_only_layers=[2]), "layer 2 lacks .*dense"),
    ],
)
def test_a_folder_that_would_load_wrongly_is_refused(change, says, base, tmp_path):
    config, tensors = config_of(base("qwen3_moe-plain")), tensors_of(base("qwen3_moe-plain"))
    change(config, tensors)
    folder = write_folder(tmp_path / "wrong", config, tensors)
    with pytest.raises(ValueError, match=says):
        export(open_folder(folder), tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong"]


def test_export_holds_one_shard_in_memory_and_keeps_what_goes_with_it(base, tmp_path):
    stock = base("qwen2_moe")
    exported(stock, tmp_path, BLOCKS, shard_bytes=10_000)
    folder = tmp_path / "exported"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 4
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= 10_000 for path in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {name: {*load_file(folder / name)} for name in {*index["weight_map"].values()}} == {
        path.name: {name for name, file in index["weight_map"].items() if file == path.name} for path in files
    }
    assert (folder / "tokenizer.json").is_file() and (folder / "generation_config.json").is_file()
    assert not (folder / "compressed.json").exists()


def test_an_interrupted_export_goes_on_and_touches_no_interrupted_apply(base, tmp_path, monkeypatch):
    stock = base("qwen2_moe")
    whole = exported(stock, tmp_path, BLOCKS, shard_bytes=10_000)
    source, written = open_folder(tmp_path / "applied"), []

    def until_full(tensors: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
        if len(written) == 2:
            raise OSError("no space left")
        written.append(path.name)
        save_file(tensors, path, about)

    (tmp_path / ".target.partial").mkdir()
    monkeypatch.setattr(export_module, "save_file", until_full)
    with pytest.raises(OSError, match="no space"):
        export(source, tmp_path / "target", shard_bytes=10_000)
    assert not (tmp_path / "target").exists()
    stamps = {(tmp_path / ".target.export" / name).stat().st_ino for name in written}
    monkeypatch.setattr(export_module, "save_file", save_file)
    again = export(source, tmp_path / "target", shard_bytes=10_000)
    assert replace(again, target="") == replace(whole, target="")
    made, expected = (sorted((tmp_path / name).iterdir()) for name in ("target", "exported"))
    assert [path.name for path in made] == [path.name for path in expected]
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in expected]
    assert stamps <= {path.stat().st_ino for path in made}, "written once"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.partial", "applied", "exported", "target"]


def test_what_another_export_began_is_thrown_away(base, tmp_path, monkeypatch):
    applied(base("qwen2_moe"), tmp_path / "applied", **BLOCKS)
    source = open_folder(tmp_path / "applied")

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "complete", stop)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "target", shard_bytes=10_000)
    monkeypatch.undo()
    export(source, tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").glob("*safetensors*")) == ["model.safetensors"]


def test_a_target_that_holds_something_is_refused(base, tmp_path):
    applied(base("mixtral"), tmp_path / "applied", **BLOCKS)
    with pytest.raises(ValueError, match="exists; name a new folder"):
        export(open_folder(tmp_path / "applied"), tmp_path / "applied")


NATIVE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"qk_norm": "head", "moe": {"per_layer": (0, 4, 0, 4), "dense": (2,)}},
    "mixtral": {"qk_norm": "none", "moe": {}},
    "qwen2_moe": {"qk_norm": "none", "d_head": 16, "moe": {"per_layer": (4, 0, 4, 4)}},
    "qwen2_moe-shared": {"qk_norm": "none", "moe": {"per_layer": (0, 0, 4, 4), "dense": (0,), "shared_experts": 2}},
    "olmoe": {"qk_norm": "full", "moe": {}},
}


def native(case: str, **router: Any) -> tuple[Decoder, RouterConfig]:
    """A model of ours with random weights, some of whose layers only attend."""
    said = NATIVE[case]
    moe = MoEConfig(experts=4, d_expert=16, **said["moe"])
    model = ModelConfig(
        vocab_size=257, d_model=32, layers=4, heads=4, kv_heads=2, d_ff=48, **{**said, "moe": moe}, init_std=0.3
    )
    config = RouterConfig(**({"top_k": 2, "normalize": "none" if "shared" in case else "top_k"} | router))
    return build_decoder(model, config, single(torch.device("cpu")), seed=0).eval(), config


def source_of(model: Decoder, router: RouterConfig, folder: Path):
    how = {"fingerprint": "of the run", "max_positions": 32, "end_token": None, "tokenizer": folder}
    return from_decoder(model, router, folder, **how)


@pytest.mark.parametrize("case", NATIVE)
def test_a_run_of_ours_computes_the_same_in_stock_transformers(case, here, tmp_path):
    model, router = native(case)
    done = export(source_of(model, router, tmp_path), tmp_path / "exported")
    assert done.family == case.partition("-")[0]
    found = verify(tmp_path / "exported", logits_of=lambda tokens_BS: dropless_logits(model, tokens_BS))
    assert found.problems == ()
    assert 0.0 < found.difference <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("olmoe", {"per_layer": (4, 0, 4, 4)}, r"layers \[1\] .*olmoe family have some in all"),
        ("olmoe", {"per_layer": (4, 0, 4, 4), "dense": (1,)}, r"layers \[1\] are dense"),
        ("qwen3_moe", {"per_layer": (0, 4, 3, 4), "dense": ()}, "3 to 4 experts"),
        ("qwen3_moe", {"shared_experts": 1}, "shared_experts: 1 is more than"),
    ],
)
def test_a_run_that_no_family_can_say_is_refused(case, change, says, tmp_path, monkeypatch):
    monkeypatch.setitem(NATIVE, case, NATIVE[case] | {"moe": NATIVE[case]["moe"] | change})
    model, router = native(case)
    with pytest.raises(ValueError, match=says):
        export(source_of(model, router, tmp_path), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_selection_bias_is_refused(tmp_path):
    model, router = native("mixtral")
    model.blocks.get_submodule("1").ffn.router.bias_E[2] = 0.5
    with pytest.raises(ValueError, match=r"blocks.1.ffn: its selection bias is not zero"):
        source_of(model, router, tmp_path)


def test_verify_sees_what_loaders_pass_over(base, here, tmp_path):
    stock = base("deepseek_v3")
    exported(stock, tmp_path, BLOCKS)
    config, tensors = config_of(tmp_path / "exported"), tensors_of(tmp_path / "exported")
    # Number 61, and it alone, is ignored by the stock class without a word.
    extra = {"model.layers.61.mlp.gate.weight": torch.ones(8, 16)}
    (problem,) = verify(write_folder(tmp_path / "extra", config, tensors | extra)).problems
    assert problem == "left over (1): model.layers.61.mlp.gate.weight"
    tensors["model.norm.weight"][0] = float("nan")
    problems = verify(write_folder(tmp_path / "nan", config, tensors)).problems
    assert "not finite (1): model.norm.weight" in problems


def test_verify_compares_with_the_base_only(base, here, tmp_path):
    stock = base("mixtral")
    exported(stock, tmp_path, BLOCKS)
    other = save_stock("mixtral", tmp_path / "other", num_hidden_layers=6, num_local_experts=4)
    with pytest.raises(ValueError, match="the router of layer 1 is not the one"):
        verify(tmp_path / "exported", against=other)
    with pytest.raises(ValueError, match="is olmoe, and the export was made from mixtral"):
        verify(tmp_path / "exported", against=base("olmoe"))
    changed = shutil.copytree(tmp_path / "exported", tmp_path / "changed")
    path = next(changed.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    save_file(tensors | {name: 1.001 * tensors[name]}, path, {"format": "pt"})
    (problem,) = verify(changed, against=stock).problems
    assert problem.startswith("logits differ by ") and problem.endswith("0e+00 is allowed")


def said(capsys, *words: str) -> tuple[int, str]:
    """Exit code and output of the command line."""
    code = main(["compress", *words])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_commands_export_and_verify_in_another_process(base, tmp_path, capsys):
    stock = base("qwen3_moe")
    applied(stock, tmp_path / "applied", **FIRST)
    target = str(tmp_path / "exported")
    code, text = said(capsys, "export", str(tmp_path / "applied"), target, "--shard-size", "20KiB")
    assert code == 0 and "layers [0] have no experts: a dense network of 24 zeros" in text
    code, text = said(capsys, "verify", target, "--against", str(stock), "--json")
    assert code == 0
    found = json.loads(text)
    assert found["difference"] == 0.0 and found["problems"] == [] and found["parameters"] < found["base_parameters"]
    config = config_of(tmp_path / "exported") | {"mlp_only_layers": []}
    (tmp_path / "exported" / "config.json").write_text(json.dumps(config))
    code, text = said(capsys, "verify", target)
    assert code == 2 and "missing (" in text and len(text.splitlines()) == 1


def test_commands_compare_with_a_run_of_ours_and_with_a_compressed_folder(base, here, tmp_path, capsys):
    model, router = native("mixtral")
    run, smaller = tmp_path / "run", tmp_path / "smaller"
    config = TrainConfig(
        model=model.config,
        router=replace(router, capacity_factor=1.0),
        data=DataConfig(tokenizer="bytes", seq_len=32),
        log=LogConfig(dir=str(run)),
    )
    write_run(config, model, byte_tokenizer(), "a test")
    shape = shape_of_model(model.config, router)
    plan = DropPlan(base=checkpoint_fingerprint(run), shape=shape, blocks=(0,), layers=(2,))
    apply_to_run(run, smaller, plan)
    folder = applied(base("deepseek_v2"), tmp_path / "applied", **FIRST)
    for source, family in ((smaller, "qwen2_moe"), (folder, "deepseek_v2")):
        target = tmp_path / f"exported-{family}"
        code, text = said(capsys, "export", str(source), str(target), "--json")
        assert code == 0, text
        assert json.loads(text)["family"] == family
        code, text = said(capsys, "verify", str(target), "--against", str(source), "--json")
        assert code == 0, text
        assert 0.0 < json.loads(text)["difference"] <= TOLERANCE
    assert (tmp_path / "exported-qwen2_moe" / "tokenizer.json").is_file()


def test_commands_refuse_in_one_line(base, tmp_path, capsys):
    applied(base("olmoe"), tmp_path / "applied", **LAYERS)
    source, target = str(tmp_path / "applied"), str(tmp_path / "exported")
    for words, says in (
        (("export", source, target), "--allow-zeroed"),
        (("export", source, target, "--shard-size", "much"), "--shard-size: "),
        (("export", str(tmp_path / "nothing"), target), "nothing"),
        (("verify", source), "config.json"),
        (("verify", str(base("olmoe")), "--python", str(tmp_path / "none")), "is no program that can be started"),
    ):
        code, text = said(capsys, *words)
        assert code == 2 and says in text and len(text.splitlines()) == 1
    assert not (tmp_path / "exported").exists()
