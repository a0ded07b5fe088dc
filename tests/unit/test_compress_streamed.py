"""Models read layer by layer against transformers' own and our decoder with the same weights.

Differences are measured against the largest logit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from wastenot.launch.compressed_run import apply_plan
from wastenot.launch.config import DataConfig, LogConfig, TrainConfig
from wastenot.launch.errors import UserError
from wastenot.launch.saved_run import open_run, write_run
from wastenot.launch.streamed import open_streamed
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.adapters.huggingface import StoredWeights
from wastenot.moe.compress.change import weight_change
from wastenot.moe.compress.families import MODULES
from wastenot.moe.compress.forward import block_output, moe_output, read_planned, run_layers
from wastenot.moe.compress.native import NativeModel
from wastenot.moe.compress.open import open_model
from wastenot.moe.compress.places import FAMILIES
from wastenot.moe.compress.plan import DropPlan, Quantize, Shape
from wastenot.moe.compress.quantize import dequantize, nearest
from wastenot.moe.compress.stored import COMPRESSED
from wastenot.moe.compress.streamed import StreamedModel
from wastenot.moe.config import ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.parallel.mesh import single

logging.disable_progress_bar()
logging.set_verbosity_error()
pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 5e-6
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
}
LATENT = SHAPE | {
    "num_key_value_heads": 4,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
}
CASES: dict[str, Any] = {
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2),
    "mixtral-window": MixtralConfig(
        **SHAPE, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2, sliding_window=5
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE,
        intermediate_size=80,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=3,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE,
        head_dim=16,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        tie_word_embeddings=True,
    ),
    "olmoe": OlmoeConfig(**SHAPE, intermediate_size=32, num_experts=16, num_experts_per_tok=4, clip_qkv=0.5),
    "deepseek_v2": DeepseekV2Config(
        **LATENT, q_lora_rank=20, n_group=3, topk_group=2, topk_method="group_limited_greedy"
    ),
    "deepseek_v2-greedy": DeepseekV2Config(**LATENT, q_lora_rank=None),
    "deepseek_v3": DeepseekV3Config(**LATENT, q_lora_rank=20, n_group=3, topk_group=2, num_nextn_predict_layers=0),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Callable[[str], tuple[Path, Any]]:
    """Makes, once, the folder of a case and transformers' model of it, with weights that make every part count."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(case: str) -> tuple[Path, Any]:
        if case not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CASES[case], attn_implementation="sdpa").eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
                for name, buffer in model.named_buffers():
                    if name.endswith("e_score_correction_bias"):
                        buffer.normal_(0.0, 0.3)
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case] = folder, model
        return made[case]

    return make


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(seed))


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def streamed_logits(folder: Path, plan: DropPlan | None = None) -> Tensor:
    model = open_model(folder)
    return model.logits(run_layers(model, tokens(), plan, batch=2))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(tokens()).logits


class Bypassed:
    """While it lasts, transformers' model computes what a plan would leave of it."""

    def __init__(self, model: Any, plan: DropPlan) -> None:
        self.model, self.plan = model, plan
        self.undo: list[Any] = []

    def __enter__(self) -> None:
        layers, plan = self.model.model.layers, self.plan
        for number in plan.blocks:
            self._after(layers[number], lambda module, given, made: given[0])
        for number in plan.layers:
            self._after(layers[number].mlp, lambda module, given, made: torch.zeros_like(made))
        for number, gone in plan.experts.items():
            feed = layers[number].mlp
            if plan.semantics == "skip":
                self._zero(feed.experts.down_proj, gone)
            else:
                self._never(feed.gate, gone)

    def __exit__(self, *error: object) -> None:
        for undo in self.undo:
            undo()

    def _after(self, module: Any, hook: Any) -> None:
        self.undo.append(module.register_forward_hook(hook).remove)

    @torch.no_grad()
    def _zero(self, weight: Tensor, gone: tuple[int, ...]) -> None:
        before = weight.clone()
        weight[list(gone)] = 0
        self.undo.append(lambda: weight.data.copy_(before))

    def _never(self, gate: Any, gone: tuple[int, ...]) -> None:
        """The gate's logits of those experts become -inf, inside its forward."""
        import torch.nn.functional as F

        linear, weight = F.linear, gate.weight

        def masked(x: Tensor, given: Tensor, bias: Tensor | None = None) -> Tensor:
            out = linear(x, given, bias)
            if given.shape == weight.shape and torch.equal(given, weight):
                out[:, list(gone)] = -torch.inf
            return out

        forward = gate.forward

        def changed(x: Tensor) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "linear", masked)
                return forward(x)

        gate.forward = changed
        self.undo.append(lambda: gate.__dict__.pop("forward"))
        bias = gate._buffers.get("e_score_correction_bias")
        if bias is not None:
            # A sigmoid score of 0 could still be chosen for its bias.
            before = bias.clone()
            bias[list(gone)] = -1e4
            self.undo.append(lambda: bias.copy_(before))


def plan_for(shape: Shape, **cuts: Any) -> DropPlan:
    return DropPlan(base="", shape=shape, **cuts)


def gone_of(shape: Shape) -> tuple[int, ...]:
    """The first of each group, or two of a single one."""
    experts = max(shape.experts)
    return tuple(range(0, experts, experts // shape.groups)) if shape.groups > 1 else (1, experts - 1)


@pytest.mark.parametrize("case", CASES)
def test_streamed_logits_are_those_of_transformers(case: str, stock) -> None:
    folder, model = stock(case)
    assert difference(streamed_logits(folder), logits_of(model)) < SAME


def test_every_family_has_a_case() -> None:
    assert {config.model_type for config in CASES.values()} == set(MODULES) == set(FAMILIES)


@pytest.mark.parametrize("semantics", ["reroute", "skip"])
@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_the_model_with_those_modules_bypassed(case: str, semantics: str, stock) -> None:
    folder, model = stock(case)
    shape = open_model(folder).shape
    last = shape.layers - 1
    plan = plan_for(shape, blocks=(1,), layers=(2,), experts={last: gone_of(shape)}, semantics=semantics)
    whole = logits_of(model)
    with Bypassed(model, plan):
        wanted = logits_of(model)
    assert difference(logits_of(model), whole) == 0
    assert difference(wanted, whole) > 0.05
    assert difference(streamed_logits(folder, plan), wanted) < SAME


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_cut_alone_is_the_bypass(case: str, stock) -> None:
    folder, model = stock(case)
    shape = open_model(folder).shape
    for cuts in ({"blocks": (0, 3)}, {"layers": (0,)}, {"experts": {3: gone_of(shape)}}):
        plan = plan_for(shape, **cuts)
        with Bypassed(model, plan):
            wanted = logits_of(model)
        assert difference(streamed_logits(folder, plan), wanted) < SAME, cuts


@pytest.mark.parametrize("semantics", ["reroute", "skip"])
def test_the_order_in_which_experts_are_kept_does_not_matter(semantics: str, stock) -> None:
    folder, _ = stock("qwen2_moe")
    shape = open_model(folder).shape
    gone, left = (2, 5), [0, 1, 3, 4, 6, 7] if semantics == "reroute" else list(range(8))
    plain = plan_for(shape, experts={3: gone}, semantics=semantics)
    order = {3: tuple(reversed(left))}
    turned = plan_for(shape, experts={3: gone}, order=order, semantics=semantics)
    assert difference(streamed_logits(folder, turned), streamed_logits(folder, plain)) < SAME


def applied(source: Path, target: Path, **cuts: Any) -> DropPlan:
    """Makes `target` of `source` by a plan, and returns that."""
    model = open_streamed(source)
    plan = DropPlan(base=model.fingerprint, shape=model.shape, **cuts)
    apply_plan(source, target, plan)
    return plan


@pytest.mark.parametrize("semantics", ["reroute", "skip"])
@pytest.mark.parametrize("case", CASES)
def test_an_applied_folder_is_the_plan(case: str, semantics: str, stock, tmp_path: Path) -> None:
    folder, _ = stock(case)
    gone = gone_of(open_model(folder).shape)
    plan = applied(folder, tmp_path / "less", blocks=(1,), layers=(2,), experts={3: gone}, semantics=semantics)
    assert open_model(tmp_path / "less").shape == plan.result
    assert difference(streamed_logits(tmp_path / "less"), streamed_logits(folder, plan)) == 0


def test_layers_keep_the_windows_that_they_had(stock, tmp_path: Path) -> None:
    """Layer 0 goes, and `layer_types` of the source differ from one layer to the next."""
    folder, model = stock("qwen2_moe")
    assert len(set(model.config.layer_types)) == 2
    plan = applied(folder, tmp_path / "less", blocks=(0,), layers=(1,), order={3: (7, 0, 5, 3, 4, 6, 2, 1)})
    with Bypassed(model, plan):
        wanted = logits_of(model)
    assert difference(streamed_logits(tmp_path / "less"), wanted) < SAME


def test_d10_a_second_layer_drop_goes_on_from_the_first(stock, tmp_path: Path) -> None:
    folder, _ = stock("qwen2_moe")
    applied(folder, tmp_path / "once", layers=(0,))
    shape = open_model(tmp_path / "once").shape
    second = plan_for(shape, layers=(2,), experts={3: (0,)})
    both = plan_for(open_model(folder).shape, layers=(0, 2), experts={3: (0,)})
    assert difference(streamed_logits(tmp_path / "once", second), streamed_logits(folder, both)) == 0
    with pytest.raises(ValueError, match="layers: 0 has no feed-forward network to drop"):
        plan_for(shape, layers=(0,))


@pytest.mark.parametrize("case", CASES)
def test_d12_a_router_chooses_no_more_experts_than_are_kept(case: str, stock) -> None:
    model = open_model(stock(case)[0])
    groups = model.shape.groups
    width = 12 // groups
    kept = [group * width + place for group in range(groups) for place in range(2)] if groups > 1 else [2, 5]
    most = model.shape.top_groups * 2 if groups > 1 else 2
    choice = model.layer(3, kept).route(torch.randn(11, model.d_model))
    assert choice.experts_TK.shape[1] == min(model.shape.top_k, most)
    assert all(len(set(row)) == len(row) and max(row) < len(kept) for row in choice.experts_TK.tolist())
    torch.testing.assert_close(choice.probs_TE.sum(-1), torch.ones(11))


@pytest.mark.parametrize("case", ["qwen2_moe", "deepseek_v3"])
def test_d9_a_layer_without_experts_only_attends(case: str, stock) -> None:
    model = open_model(stock(case)[0])
    layer = read_planned(model, 2, plan_for(model.shape, layers=(2,)), (0, 1))
    h_BSD = torch.randn(2, 5, 48)
    a_BSD, b_BSD = block_output(layer, h_BSD, single())
    assert torch.equal(a_BSD, model.layer(2).attend(h_BSD))
    assert torch.equal(b_BSD, a_BSD)


@pytest.mark.parametrize("case", ["qwen2_moe", "deepseek_v3"])
def test_d13_a_router_keeps_the_rows_of_skipped_experts(case: str, stock) -> None:
    model = open_model(stock(case)[0])
    plan = plan_for(model.shape, experts={2: gone_of(model.shape)}, semantics="skip")
    x_TD = torch.randn(9, 48)
    found, whole = read_planned(model, 2, plan, (0, 1)).route(x_TD), model.layer(2).route(x_TD)
    assert torch.equal(found.probs_TE, whole.probs_TE)
    assert torch.equal(found.experts_TK, whole.experts_TK)
    assert torch.equal(found.weights_TK, whole.weights_TK)


@pytest.mark.parametrize("case", CASES)
def test_d6_no_tokens_are_no_rows(case: str, stock) -> None:
    layer = open_model(stock(case)[0]).layer(3)
    x_TD = torch.zeros(0, 48)
    seen = []
    y_TD = moe_output(
        layer, x_TD, layer.route(x_TD), single(), lambda *given: seen.append([len(each) for each in given])
    )
    assert y_TD.shape == (0, 48)
    assert seen == [[0, 0, 0, 0, layer.num_experts]]


@pytest.mark.parametrize("case", ["qwen2_moe", "deepseek_v3"])
def test_an_observer_sees_each_expert_with_the_weights_of_its_rows(case: str, stock) -> None:
    layer = open_model(stock(case)[0]).layer(3)
    assert layer.experts is not None
    x_TD = torch.randn(23, 48)
    choice = layer.route(x_TD)
    seen: list[tuple[Tensor, ...]] = []
    y_TD = moe_output(layer, x_TD, choice, single(), lambda *given: seen.append(given))
    rows_RD, hidden_RF, outputs_RD, gates_R, offsets_e = seen[0]
    total_TD = torch.zeros_like(x_TD)
    for expert, (first, end) in enumerate(zip([0, *offsets_e.tolist()], offsets_e.tolist(), strict=False)):
        token_T, place_T = (choice.experts_TK == expert).nonzero(as_tuple=True)
        assert torch.equal(rows_RD[first:end], x_TD[token_T])
        assert torch.equal(gates_R[first:end], choice.weights_TK[token_T, place_T])
        torch.testing.assert_close(hidden_RF[first:end] @ layer.experts.down[expert].T, outputs_RD[first:end])
        total_TD.index_add_(0, token_T, gates_R[first:end, None] * outputs_RD[first:end])
    shared_TD = layer.shared(x_TD)
    assert shared_TD is not None
    torch.testing.assert_close(y_TD, total_TD + shared_TD)
    torch.testing.assert_close(y_TD, moe_output(layer, x_TD, choice, single()))


def test_only_the_experts_of_the_share_are_read(stock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(stock("mixtral")[0])
    read: list[str] = []
    monkeypatch.setattr(
        StoredWeights, "__getitem__", lambda self, name: read.append(name) or self._files[name].get_tensor(name)
    )
    layer = model.layer(2, kept=(1, 6, 4, 3), share=(1, 2))
    assert layer.num_experts == 4
    assert {name.split(".")[5] for name in read if "experts" in name} == {"3", "4"}
    read.clear()
    layer = model.layer(2, feed=False)
    assert (layer.num_experts, layer.is_dense, layer.experts) == (0, False, None)
    assert read
    assert all("self_attn" in name or "input_layernorm" in name for name in read)


def test_shares_are_the_parts_of_the_whole(stock) -> None:
    model = open_model(stock("olmoe")[0])
    kept = (3, 9, 1, 0, 7, 11)
    whole = model.layer(1, kept).experts
    parts = [model.layer(1, kept, (rank, 3)).experts for rank in range(3)]
    for name in ("gate_up", "down"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_sizes_count_every_weight(case: str, stock) -> None:
    folder, transformers_model = stock(case)
    model = open_model(folder)
    assert model.element_bytes == 4
    layers = transformers_model.model.layers
    whole = sum(each.numel() for each in transformers_model.state_dict().values())
    inside = [sum(each.numel() for each in layer.state_dict().values()) for layer in layers]
    assert [model.size(number).whole for number in range(4)] == inside
    assert model.outside_size == whole - sum(inside)
    for number, layer in enumerate(layers):
        size = model.size(number)
        attention = [*layer.self_attn.parameters(), *layer.input_layernorm.parameters()]
        assert size.attention == sum(each.numel() for each in attention)
        assert size.num_experts == model.shape.experts[number]
        if size.num_experts:
            gate = sum(each[0].numel() for each in layer.mlp.gate.state_dict().values())
            assert size.expert == 3 * 48 * size.hidden + gate
            assert size.hidden == layer.mlp.experts.down_proj.shape[-1]
        else:
            assert (size.expert, size.hidden) == (0, 80)


def test_weights_in_bf16_are_computed_in_fp32(stock, tmp_path: Path) -> None:
    _, model = stock("olmoe")
    AutoModelForCausalLM.from_config(model.config).to(torch.bfloat16).save_pretrained(tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa").eval()
    assert open_model(tmp_path).layer(0).attend(torch.zeros(1, 2, 48)).dtype is torch.float32
    assert difference(streamed_logits(tmp_path), logits_of(wanted)) < SAME


def copy_of(folder: Path, target: Path, **changes: Any) -> Path:
    """The folder with these keys of its config.json changed."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def with_weights(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    weights = load_file(folder / "model.safetensors")
    save_file(dict(change(weights)), folder / "model.safetensors")
    return folder


def few_bits(source: Path, target: Path, bits: int) -> StreamedModel:
    """What quantizing `source` leaves, read again."""
    model = open_streamed(source)
    plan = DropPlan(base=model.fingerprint, shape=model.shape, quantize=Quantize(bits=bits, group=16))
    apply_plan(source, target, plan, transform=weight_change(plan))
    return open_streamed(target)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_in_few_bits_is_its_weights_formed_again(bits: int, stock, tmp_path: Path) -> None:
    folder, _ = stock("mixtral")
    found, whole = few_bits(folder, tmp_path / "few", bits), open_model(folder)
    stored = load_file(tmp_path / "few" / "model.safetensors")
    for name in [name for name in stored if name.endswith(".q")]:
        weight = name.removesuffix(".q")
        stored[weight] = dequantize(stored.pop(name), stored.pop(f"{weight}.scale"))
    save_file(stored, copy_of(folder, tmp_path / "again") / "model.safetensors")
    assert difference(native_logits(found), streamed_logits(tmp_path / "again")) == 0
    assert difference(native_logits(found), native_logits(whole)) > 0
    assert [found.size(number) for number in range(4)] == [whole.size(number) for number in range(4)]
    assert (found.outside_size, found.element_bytes) == (whole.outside_size, whole.element_bytes)


def test_a_fingerprint_tells_weights_and_configurations_apart(stock, tmp_path: Path) -> None:
    folder, _ = stock("mixtral")
    same = copy_of(folder, tmp_path / "same")
    other = copy_of(folder, tmp_path / "other", rms_norm_eps=1e-3)
    name = "model.layers.3.block_sparse_moe.experts.7.w2.weight"
    moved = copy_of(folder, tmp_path / "moved")
    with_weights(moved, lambda weights: weights | {name: weights[name].nextafter(torch.ones(()))})
    found = [open_model(path).fingerprint for path in (folder, same, other, moved)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_layers_that_predict_further_tokens_are_passed_over(stock, tmp_path: Path) -> None:
    folder = copy_of(stock("deepseek_v3")[0], tmp_path / "mtp", num_nextn_predict_layers=1)
    with_weights(folder, lambda weights: weights | {"model.layers.4.eh_proj.weight": torch.ones(2)})
    assert difference(streamed_logits(folder), streamed_logits(stock("deepseek_v3")[0])) == 0


GATE = "model.layers.1.block_sparse_moe.gate.weight"
EXTRA = "model.layers.1.block_sparse_moe.experts.8.w1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: t for n, t in w.items() if n != GATE}, f"layer 1 misses {GATE}$"),
        (lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"}, r"misses model\.norm\.weight$"),
        (
            lambda w: w | {EXTRA: torch.ones(1)},
            f"layer 1 has, and should not, {EXTRA}$",
        ),
        (
            lambda w: w | {"model.layers.4.x.weight": torch.ones(1)},
            r"with 4 layers: model\.layers\.4\.x\.weight; remove",
        ),
        (lambda w: w | {GATE: torch.ones(7, 48)}, rf"{GATE} \[7, 48\] is not the \[8, 48\]"),
    ],
)
def test_what_does_not_fit_the_configuration_is_refused(change: Any, message: str, stock, tmp_path: Path) -> None:
    folder = with_weights(copy_of(stock("mixtral")[0], tmp_path / "changed"), change)
    with pytest.raises(ValueError, match=message):
        open_model(folder).layer(1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "model_type: 'bert' cannot be compressed; supported are mixtral, "),
        ({"quantization_config": {"quant_method": "fp8"}}, "others quantized its weights; give the model in bf16"),
        ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, "per_layer_config: .* changes no module of stock models"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not the 'silu'"),
    ],
)
def test_configurations_that_cannot_be_read_are_refused(config: dict, message: str, stock, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_model(copy_of(stock("mixtral")[0], tmp_path / "changed", **config))


def test_applied_folders_that_do_not_fit_are_refused(stock, tmp_path: Path) -> None:
    folder, _ = stock("qwen2_moe")
    applied(folder, tmp_path / "less", layers=(0,), experts={3: (0,)})
    file = tmp_path / "less" / COMPRESSED
    said = json.loads(file.read_text())
    shape = said["shape"]
    for changes in (
        {"origin": [0, 1, 2]},
        {"origin": [0, 1, 2, 4]},
        {"shape": shape | {"experts": [0, 0, 9, 7]}},
        {"shape": shape | {"dense": [0, 1]}},
    ):
        file.write_text(json.dumps(said | changes))
        with pytest.raises(ValueError, match=r"its layers or experts are not some of those in base_config\.json"):
            open_model(file.parent)
    # More experts than the files have.
    file.write_text(json.dumps(said | {"shape": shape | {"experts": [0, 0, 8, 8]}}))
    with pytest.raises(ValueError, match=r"layer 3 misses model\.layers\.3\.mlp\.experts\.7"):
        open_model(file.parent).layer(3)


@pytest.mark.parametrize(
    ("case", "asked", "message"),
    [
        ("olmoe", {"kept": (0, 16)}, r"\[0, 16\] of layer 3 are not distinct experts of its 16"),
        ("olmoe", {"kept": (4, 4)}, r"\[4, 4\] of layer 3 are not distinct experts of its 16"),
        ("olmoe", {"kept": ()}, "of layer 3 none is left; keep one at least, or read it with feed=False"),
        ("olmoe", {"share": (0, 3)}, "16 cannot be shared by 3 ranks"),
        ("deepseek_v3", {"kept": (0, 1, 4, 5, 8)}, "not equally many, 2 at least, of each of its router's 3 groups"),
        ("deepseek_v3", {"kept": (0, 4, 8)}, "not equally many, 2 at least, of each of its router's 3 groups"),
        ("deepseek_v3", {"kept": (0, 4, 1, 5, 8, 9)}, "groups, group after group"),
    ],
)
def test_experts_that_a_layer_cannot_be_read_with_are_refused(case: str, asked: dict, message: str, stock) -> None:
    with pytest.raises(ValueError, match=message):
        open_model(stock(case)[0]).layer(3, **asked)


def test_a_plan_for_another_shape_is_refused(stock) -> None:
    plan = plan_for(open_model(stock("olmoe")[0]).shape, blocks=(0,))
    with pytest.raises(ValueError, match="the plan is for a model of Shape"):
        streamed_logits(stock("mixtral")[0], plan)


def test_transformers_is_needed_for_its_checkpoints_alone(stock, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "import sys, wastenot.launch.streamed, wastenot.moe.compress.stock; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", words], check=True)
    monkeypatch.setitem(sys.modules, "transformers.models.mixtral.modeling_mixtral", None)
    with pytest.raises(ImportError, match=r"need transformers 5; pip install 'wastenot\[hf\]'"):
        open_model(stock("mixtral")[0])
    with pytest.raises(UserError, match=r"pip install 'wastenot\[hf\]'"):
        open_streamed(stock("mixtral")[0])


SMALL = ModelConfig(vocab_size=257, d_model=48, layers=4, heads=4, init_std=0.2)
RUNS: dict[str, tuple[ModelConfig, RouterConfig]] = {
    "plain": (replace(SMALL, moe=MoEConfig(experts=6, d_expert=24)), RouterConfig(normalize="none")),
    "few": (replace(SMALL, moe=MoEConfig(experts=6, d_expert=32)), RouterConfig()),
    "capacity": (
        replace(SMALL, qk_norm="full", tie_embeddings=True, moe=MoEConfig(experts=6, d_expert=24, every=2)),
        RouterConfig(top_k=3, capacity_factor=0.5, jitter=0.1, rectify=RectifyConfig(intra=True, fill=True)),
    ),
    "groups": (
        replace(
            SMALL, kv_heads=2, qk_norm="head", moe=MoEConfig(experts=12, d_expert=24, shared_experts=2, first_dense=1)
        ),
        RouterConfig(top_k=3, score="sigmoid", groups=3, top_groups=2, scale=2.5, bias_update=0.1),
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str], tuple[Path, Decoder]]:
    """Makes, once, a run of ours and its decoder."""
    made: dict[str, tuple[Path, Decoder]] = {}

    def make(case: str) -> tuple[Path, Decoder]:
        if case not in made:
            model, router = RUNS[case]
            folder = tmp_path_factory.mktemp(case) / "run"
            config = TrainConfig(
                model=model,
                router=router,
                data=DataConfig(tokenizer="bytes", seq_len=40),
                log=LogConfig(dir=str(folder)),
            )
            decoder = build_decoder(model, router, single(), seed=1)
            generator = torch.Generator().manual_seed(2)
            for name, buffer in decoder.named_buffers():
                if name.endswith("bias_E") and router.bias_update:
                    buffer.normal_(0.0, 0.3, generator=generator)
            write_run(config, decoder, byte_tokenizer(), "a test")
            made[case] = folder, open_run(folder).model
        return made[case]

    return make


@torch.no_grad()
def dropless_logits(model: Decoder, plan: DropPlan | None = None) -> Tensor:
    """Of our decoder, with the modules bypassed that `plan` drops."""
    undo = []
    for number, block in enumerate(model.blocks):
        ffn: Any = block.ffn if model.config.has_ffn(number) else None
        gone = list(plan.experts.get(number, ())) if plan is not None else []
        if plan is not None and number in plan.blocks:
            undo.append(block.register_forward_hook(lambda module, given, made: (given[0], made[1])).remove)
        if plan is not None and number in plan.layers:
            nothing = lambda module, given, made: (0 * made[0], made[1]) if isinstance(made, tuple) else 0 * made  # noqa: E731
            undo.append(ffn.register_forward_hook(nothing).remove)
        if not model.config.is_moe(number):
            continue
        forward = ffn.forward
        ffn.forward = lambda x, dropless, stream, forward=forward: forward(x, True, stream)
        undo.append(lambda ffn=ffn: ffn.__dict__.pop("forward"))
        if gone and plan is not None and plan.semantics == "skip":
            before = ffn.experts.down.clone()
            ffn.experts.down[gone] = 0
            undo.append(lambda ffn=ffn, before=before: ffn.experts.down.copy_(before))
        elif gone:
            logits, bias = ffn.router.logits, ffn.router.bias_E.clone()
            steps = torch.zeros_like(bias).index_fill_(0, torch.tensor(gone), -torch.inf)
            ffn.router.logits = lambda x, blocks, logits=logits, steps=steps: logits(x, blocks) + steps
            # A score of 0 could still be chosen, for its bias or among others of 0.
            ffn.router.bias_E[gone] = -1e4
            undo.append(lambda ffn=ffn: ffn.router.__dict__.pop("logits"))
            undo.append(lambda ffn=ffn, bias=bias: ffn.router.bias_E.copy_(bias))
    logits = model.logits(model(tokens()).hidden_BSD)
    for each in undo:
        each()
    return logits


def native_logits(model: StreamedModel, plan: DropPlan | None = None) -> Tensor:
    return model.logits(run_layers(model, tokens(), plan, batch=2))


@pytest.mark.parametrize("case", RUNS)
def test_a_streamed_run_is_our_decoder(case: str, run) -> None:
    folder, decoder = run(case)
    model = open_streamed(folder)
    wanted = dropless_logits(decoder)
    assert difference(native_logits(model), wanted) < SAME
    shape, last = model.shape, 3
    for semantics in ("reroute", "skip"):
        plan = plan_for(shape, blocks=(1,), layers=(2,), experts={last: gone_of(shape)}, semantics=semantics)
        cut = dropless_logits(decoder, plan)
        assert difference(cut, wanted) > 0.05
        assert difference(native_logits(model, plan), cut) < SAME
    assert difference(dropless_logits(decoder), wanted) == 0


@pytest.mark.parametrize("semantics", ["reroute", "skip"])
@pytest.mark.parametrize("case", RUNS)
def test_an_applied_run_is_the_plan(case: str, semantics: str, run, tmp_path: Path) -> None:
    folder, _ = run(case)
    gone = gone_of(open_streamed(folder).shape)
    plan = applied(folder, tmp_path / "less", blocks=(1,), layers=(2,), experts={3: gone}, semantics=semantics)
    model = open_streamed(tmp_path / "less")
    assert model.shape == plan.result
    assert difference(native_logits(model), native_logits(open_streamed(folder), plan)) == 0
    assert difference(native_logits(model), dropless_logits(open_run(tmp_path / "less").model)) < SAME


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_in_few_bits_is_its_weights_formed_again(bits: int, run, tmp_path: Path) -> None:
    folder, _ = run("few")
    found, whole = few_bits(folder, tmp_path / "few", bits), open_streamed(folder)
    assert difference(native_logits(found), native_logits(whole)) > 0
    assert [found.size(number) for number in range(4)] == [whole.size(number) for number in range(4)]
    experts, before = found.layer(2, kept=(4, 1)).experts, whole.layer(2, kept=(4, 1)).experts
    assert experts is not None and before is not None
    for name in ("gate_up", "down"):
        formed = dequantize(*nearest(getattr(before, name), Quantize(bits=bits, group=16)))
        assert torch.equal(getattr(experts, name), formed)


def test_d12_a_router_of_ours_chooses_no_more_experts_than_are_kept(run) -> None:
    layer = open_streamed(run("capacity")[0]).layer(3, kept=(4,))
    choice = layer.route(torch.randn(5, 48))
    assert torch.equal(choice.experts_TK, torch.zeros(5, 1, dtype=torch.int64))
    torch.testing.assert_close(choice.weights_TK, torch.ones(5, 1))


def test_sizes_of_a_run_count_every_weight(run) -> None:
    folder, decoder = run("groups")
    model = open_streamed(folder)
    inside = [sum(each.numel() for each in block.state_dict().values()) for block in decoder.blocks]
    assert [model.size(number).whole for number in range(4)] == inside
    assert model.outside_size == sum(each.numel() for each in decoder.state_dict().values()) - sum(inside)
    assert model.element_bytes == 4
    assert [model.size(number).hidden for number in range(4)] == [decoder.config.dense_width, 24, 24, 24]
    assert model.size(1).expert == 3 * 48 * 24 + 48 + 1


def test_experts_of_a_run_are_read_alone(run, tmp_path: Path) -> None:
    """Bytes of another expert may be damaged; those asked for may not."""
    folder = shutil.copytree(run("plain")[0], tmp_path / "run")
    whole = open_streamed(folder).layer(2).experts
    assert whole is not None
    file = next(folder.glob("checkpoints/*/*.safetensors"))
    expert = whole.down[3].numpy().tobytes()
    data = file.read_bytes()
    assert data.count(expert) == 1
    file.write_bytes(data.replace(expert, bytes(len(expert))))
    part = open_streamed(folder).layer(2, kept=(5, 0, 2, 1), share=(1, 2)).experts
    assert part is not None
    assert torch.equal(part.down, whole.down[[2, 1]])
    assert torch.equal(part.gate_up, whole.gate_up[[2, 1]])
    with pytest.raises(ValueError, match="expert 3 has other bytes than were saved"):
        open_streamed(folder).layer(2)


def test_a_run_that_does_not_fit_is_refused(run, tmp_path: Path) -> None:
    folder = shutil.copytree(run("plain")[0], tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    for old, new, message in (
        ("layers: 4", "layers: 3", r"has, and should not, blocks\.3\.attention\.k\.weight"),
        ("d_expert: 24", "d_expert: 16", r"has in another shape blocks\.0\.ffn\.experts\.down"),
        ("shared_experts: 0", "shared_experts: 1", r"misses blocks\.0\.ffn\.shared\.down\.weight"),
    ):
        assert old in text
        (folder / "config.yaml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            open_streamed(folder)
    with pytest.raises(ValueError, match=r"router\.kind: uniform ignores the tokens; only learned routers"):
        NativeModel(SMALL, RouterConfig(kind="uniform", balance_loss=0.0), folder)
    with pytest.raises(UserError, match=r"config\.json: cannot be read .* give a run or the folder of a checkpoint"):
        open_streamed(tmp_path)


def test_a_run_has_the_fingerprint_of_its_weights_and_router(run, tmp_path: Path) -> None:
    folder, _ = run("plain")
    found = open_streamed(folder).fingerprint
    same = shutil.copytree(folder, tmp_path / "same")
    assert open_streamed(same).fingerprint == found
    # Checkpoints of older versions have no sums: the weights are read.
    manifest = next(same.glob("checkpoints/*/meta.json"))
    bare = json.loads(manifest.read_text())
    for entry in bare["tensors"].values():
        for chunk in entry["chunks"]:
            del chunk["sums"]
    manifest.write_text(json.dumps(bare))
    assert open_streamed(same).fingerprint == found
    text = (folder / "config.yaml").read_text()
    assert "top_k: 2" in text
    (same / "config.yaml").write_text(text.replace("top_k: 2", "top_k: 1"))
    assert open_streamed(same).fingerprint != found
