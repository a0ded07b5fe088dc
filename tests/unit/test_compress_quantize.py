"""Weights in few bits: what is stored, what it stands for, what computes with it, and that a run with it opens."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stock_models import CONFIGS, save_stock
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from wastenot.launch.config import DataConfig, LogConfig, LoopConfig, ScheduleConfig, TrainConfig
from wastenot.launch.corpus import prepare_files
from wastenot.launch.run_folder import RunFolder
from wastenot.launch.saved_run import open_run, write_run
from wastenot.launch.settings import as_mapping
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.adapters.huggingface import StoredWeights
from wastenot.moe.compress.apply import apply_plan
from wastenot.moe.compress.change import weight_change
from wastenot.moe.compress.export import export
from wastenot.moe.compress.export_quantized import packed_tensors
from wastenot.moe.compress.export_source import open_folder
from wastenot.moe.compress.fingerprint import checkpoint_fingerprint
from wastenot.moe.compress.places import NATIVE, Place, places_of
from wastenot.moe.compress.plan import DropPlan, Method, Quantize, Shape, Slim
from wastenot.moe.compress.profile import Profile, ProfileConfig
from wastenot.moe.compress.quantize import codes_of, dequantize, gptq, nearest, pack
from wastenot.moe.compress.quantized import (
    QuantizedExperts,
    QuantizedLinear,
    QuantizedWeight,
    blank_quantized_,
    pack_,
    quantize_decoder_,
)
from wastenot.moe.compress.slim import slim
from wastenot.moe.compress.stored import read_stock
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.moe.experts import GroupedExperts
from wastenot.moe.generate import generate
from wastenot.parallel.checkpoint import Checkpointer
from wastenot.parallel.expert import expert_parameter_names
from wastenot.parallel.manifest import TensorEntry
from wastenot.parallel.mesh import single
from wastenot.parallel.training_state import training_state
from wastenot.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

FOUR, EIGHT = Quantize(bits=4, group=32), Quantize(bits=8)
BOTH = pytest.mark.parametrize("how", [FOUR, EIGHT, Quantize(bits=4, group=64)], ids=["4/32", "8", "4/64"])
BF16 = 2.0**-7
"""Twice the step of bf16: products read rounded rows and return rounded sums."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by the norm of what it should be."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_four_bits_by_hand() -> None:
    """-8 is the largest and gets code -8 exactly; 7.4 is nearest to 7, -0.6 to -1."""
    weight = torch.zeros(1, 16)
    weight[0, :4] = torch.tensor([-8.0, 7.0, -1.0, 3.0])
    q, scale = nearest(weight, Quantize(bits=4, group=16))
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.uint8, (1, 8), torch.bfloat16, (1, 1))
    assert scale.item() == 1
    # Low half first, 8 more than the code: (0, 15), (7, 11), and zeros.
    assert q[0].tolist() == [0 | 15 << 4, 7 | 11 << 4, *[8 | 8 << 4] * 6]
    assert torch.equal(dequantize(q, scale), weight)
    # The same mirrored: the sign is the scale's.
    q, scale = nearest(-weight, Quantize(bits=4, group=16))
    assert scale.item() == -1
    assert torch.equal(dequantize(q, scale), -weight)


def test_eight_bits_by_hand() -> None:
    weight = torch.tensor([[-127.0, 1.4, 0.0, 63.0], [0.0, 0.0, 0.0, 0.0]])
    q, scale = nearest(weight, EIGHT)
    assert (q.dtype, scale.shape) == (torch.int8, (2, 1))
    assert q.tolist() == [[-127, 1, 0, 63], [0] * 4]
    assert scale.flatten().tolist() == [1, 0]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    how=st.sampled_from([Quantize(bits=4, group=16), FOUR, EIGHT]),
    size=st.floats(1e-20, 1e20),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_little_is_lost_zero_stays_zero_and_what_is_stored_is_stored_again_without_loss(
    rows: int, groups: int, how: Quantize, size: float, zeros: float, seed: int
) -> None:
    weight = drawn(2, rows, groups * how.group, seed=seed) * size
    weight[drawn(*weight.shape, seed=seed + 1).sigmoid() < zeros] = 0
    q, scale = nearest(weight, how)
    back = dequantize(q, scale)
    assert (back[weight == 0] == 0).all()
    grouped = weight.unflatten(-1, (scale.size(-1), -1))
    lost = (back.view_as(grouped) - grouped).double().square().sum(-1)
    if how.bits == 8:
        # Half a step each, and what rounding the scale adds at the ends.
        assert (lost.sqrt() <= 0.8 * scale.float().abs().double() * grouped.size(-1) ** 0.5).all()
    else:
        # At most what the largest weight as code -8 would lose.
        largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        step = (largest / -8).bfloat16().float()
        plain = (grouped / step.masked_fill(step == 0, 1)).round().clamp(-8, 7) * step
        assert (lost <= (plain - grouped).double().square().sum(-1) * 1.001).all()
    assert torch.equal(pack(codes_of(q), how.bits), q)
    again, same = nearest(back, how)
    assert torch.equal(dequantize(again, same), back)


@pytest.mark.parametrize(("how", "bound"), [(EIGHT, 0.012), (FOUR, 0.085), (Quantize(bits=4, group=128), 0.1)])
def test_what_normal_weights_lose(how: Quantize, bound: float) -> None:
    weight = drawn(64, 512)
    assert 0.5 * bound < off(dequantize(*nearest(weight, how)), weight) < bound


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_gptq_loses_less_than_the_nearest_codes(how: Quantize, seed: int) -> None:
    weight = drawn(32, 256, seed=seed)
    x_IN = drawn(256, 40, seed=seed + 1) @ drawn(40, 600, seed=seed + 2) + 0.5 * drawn(256, 600, seed=seed + 3)
    by_gptq, by_nearest = (
        off(dequantize(*made) @ x_IN, weight @ x_IN)
        for made in (gptq(weight, (x_IN @ x_IN.T).double(), how), nearest(weight, how))
    )
    assert by_gptq < 0.8 * by_nearest


@BOTH
def test_over_unrelated_inputs_gptq_is_the_nearest(how: Quantize) -> None:
    weight = drawn(8, 256)
    made = gptq(weight, torch.eye(256, dtype=torch.float64), how)
    for found, expected in zip(made, nearest(weight, how), strict=True):
        assert torch.equal(found, expected)


@BOTH
@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 128), (40, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_weights_that_are_stored(
    how: Quantize, rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """40 outputs are none that the kernel for 4 bits takes."""
    weight, x_RI = drawn(outputs, inputs), drawn(rows, inputs, seed=1).to(dtype)
    linear = QuantizedLinear(QuantizedWeight(*nearest(weight, how)))
    expected = x_RI.float() @ dequantize(*nearest(weight, how)).T
    loose = linear(x_RI)
    pack_(linear)
    assert linear.weight.is_packed == (how.bits == 8 or outputs == 48)
    found = linear(x_RI.view(1, rows, 1, inputs))
    assert (found.dtype, found.shape) == (dtype, (1, rows, 1, outputs))
    assert off(found.view(rows, outputs), expected) < BF16
    assert off(loose, expected) < (1e-6 if dtype == torch.float32 else BF16)


@BOTH
@pytest.mark.parametrize("sizes", [[3, 0, 1, 60], [0, 0, 0, 5], [0, 0, 0, 0], [200, 300, 1, 11]])
def test_experts_compute_what_grouped_experts_compute_with_the_weights_that_are_stored(
    how: Quantize, sizes: list[int]
) -> None:
    gate_up, down = drawn(4, 128, 64, seed=1), drawn(4, 64, 64, seed=2)
    experts = QuantizedExperts(*(QuantizedWeight(*nearest(each, how)) for each in (gate_up, down)))
    pack_(experts)
    grouped = GroupedExperts(4, 64, 64)
    grouped.load_state_dict({"gate_up": dequantize(*nearest(gate_up, how)), "down": dequantize(*nearest(down, how))})
    rows_RD, offsets_e = drawn(sum(sizes), 64, seed=3), torch.tensor(sizes).cumsum(0).int()
    found, expected = experts(rows_RD, offsets_e), grouped(rows_RD, offsets_e).detach()
    assert found.shape == expected.shape
    assert not sum(sizes) or off(found, expected) < 2 * BF16


def test_nothing_but_a_product_is_done_with_a_quantised_weight() -> None:
    weight = cast(Any, QuantizedWeight(*nearest(drawn(16, 32), FOUR)))
    for wrong in (lambda: F.linear(drawn(1, 32), weight, drawn(16)), lambda: torch.add(drawn(16, 32), weight)):
        with pytest.raises(TypeError, match=r"QuantizedWeight|must be Tensor"):
            wrong()


CONFIG = ModelConfig(
    vocab_size=257,
    d_model=64,
    layers=3,
    heads=4,
    kv_heads=2,
    d_ff=96,
    init_std=0.1,
    moe=MoEConfig(experts=4, d_expert=32, shared_experts=1, first_dense=1),
)
ROUTER = RouterConfig(top_k=2)


def a_model(**changes: Any) -> Decoder:
    return build_decoder(replace(CONFIG, **changes), ROUTER, single(), seed=1).eval()


def hidden_of(model: Decoder) -> Tensor:
    tokens_BS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens_BS).hidden_BSD


def bytes_of(model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))


def as_stored(model: Decoder, how: Quantize) -> Decoder:
    """`model` with the weights that few bits stand for, whole."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and "norm" not in name and "router" not in name:
                parameter.copy_(dequantize(*nearest(parameter, how)))
    return model


@pytest.mark.parametrize("how", [FOUR, EIGHT], ids=["4", "8"])
def test_a_decoder_computes_and_generates_as_with_the_weights_that_are_stored(how: Quantize) -> None:
    model, expected = quantize_decoder_(a_model(), how), as_stored(a_model(), how)
    # No routing hangs by so little that rounded rows would turn it.
    assert off(hidden_of(model), hidden_of(expected)) < 4 * BF16
    assert off(hidden_of(model), hidden_of(a_model())) > off(hidden_of(model), hidden_of(expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert off(hidden_of(model), hidden_of(expected)) < 4 * BF16
    before = hidden_of(model)
    assert torch.equal(hidden_of(model.float()), before)
    assert off(hidden_of(model.bfloat16()), before) < 16 * BF16
    assert len(generate(model, [[1, 2, 3], [4]], max_new_tokens=5, seed=3)[0]) == 5


def test_d2_routers_norms_embedding_and_output_layer_stay_and_all_else_is_in_few_bits() -> None:
    """Asserted of every weight, so that none is passed over in silence."""
    model, whole = quantize_decoder_(a_model(), FOUR), a_model()
    left, before = dict(model.named_parameters()), dict(whole.named_parameters())
    for name, parameter in before.items():
        stays = "norm" in name or ".router." in name or name in ("embedding.weight", "head.weight")
        assert (name in left) == stays, name
        assert not stays or torch.equal(left[name], parameter)
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    assert packed == before.keys() - left.keys()


def test_four_bits_take_five_with_what_the_kernel_wants_of_scales() -> None:
    model = quantize_decoder_(a_model(), FOUR)
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    whole = sum(p.numel() for p in a_model().parameters()) - sum(p.numel() for p in model.parameters())
    assert sum(map(bytes_of, weights)) * 8 == whole * 5  # type: ignore[arg-type]


def test_groups_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.experts\.down: group: 64 does not divide the 32 .* use 32"):
        quantize_decoder_(a_model(d_ff=128), Quantize(group=64))
    with pytest.raises(ValueError, match=r"group: 16 does not divide the 24 inputs of a weight; use bits: 8"):
        nearest(drawn(4, 24), Quantize(group=16))
    with pytest.raises(ValueError, match="a weight is not a number"):
        nearest(drawn(4, 32) * torch.inf, FOUR)
    with pytest.raises(ValueError, match="a weight is not a number"):
        gptq(drawn(4, 32) * torch.inf, torch.eye(32), FOUR)


def a_plan(**changes: Any) -> DropPlan:
    return DropPlan(base="whole", shape=Shape(experts=(0, 4, 4), dense=(0,), top_k=2), **changes)


def change_state(state: dict[str, Tensor], plan: DropPlan, profile: Profile | None = None) -> dict[str, Tensor]:
    """As apply does: matrix by matrix, stacks of experts one expert at a time."""
    change, changed = weight_change(plan, profile), {}
    assert change is not None
    for name, place in places_of(state, NATIVE, 3).items():
        if place.part == "experts":
            ones = [
                change(replace(place, part="expert", expert=e, leaf="weight"), name, each)
                for e, each in enumerate(state[name])
            ]
            changed |= {key: torch.stack([one[key] for one in ones]) for key in ones[0]}
        else:
            changed |= change(place, name, state[name])
    return changed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose checkpoint is a model in 4 bits, as apply leaves it."""
    config = TrainConfig(
        model=CONFIG,
        router=ROUTER,
        data=DataConfig(corpus=str(tmp_path / "words.txt"), dir=str(tmp_path / "data"), tokenizer="bytes", seq_len=16),
        schedule=ScheduleConfig(warmup_steps=1),
        train=LoopConfig(steps=1),
        log=LogConfig(dir=str(tmp_path / "run")),
    )
    (tmp_path / "words.txt").write_text("a stitch in time saves nine, said the seamstress. " * 60)
    write_run(config, a_model(), byte_tokenizer(), "nothing")
    folder = RunFolder(tmp_path / "run")
    shutil.rmtree(folder.checkpoints)
    model = a_model()
    state = training_state(model, None, model.mesh, expert_parameter_names(model).__contains__)
    checkpoints = Checkpointer(folder.checkpoints, model.mesh, asynchronous=False)
    checkpoints.save(0, change_state(state, a_plan(quantize=FOUR)), {"config": as_mapping(config)})
    checkpoints.close()
    return folder.path


def test_a_run_in_few_bits_opens_for_evaluation_and_generation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = open_run(run).model
    assert not found.training
    assert torch.equal(hidden_of(found), hidden_of(quantize_decoder_(a_model(), FOUR)))
    assert bytes_of(found) < 0.5 * bytes_of(a_model())
    assert main(["generate", str(run), "--prompt", "a", "--tokens", "2", "--json"]) == 0
    corpus = prepare_files([run.parent / "words.txt"], DataConfig(dir=str(run.parent), tokenizer="bytes", seq_len=16))
    assert main(["eval", str(run), "--data", str(corpus), "--json"]) == 0


def test_a_run_in_few_bits_neither_converts_nor_trains_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says why, exit code 2, and nothing written."""
    new = run.parent / "new"
    resume = ["train", str(run / "config.yaml"), "-s", f"log.dir={new}", "-s", f"checkpoint.resume={run}"]
    for arguments, purpose in (
        (["convert", "to-hf", str(run), str(new)], "converted"),
        (["upcycle", str(run), str(new), "--experts", "2"], "upcycled"),
        (["slots", str(run), "--output", str(run.parent / "slots.png")], "routed otherwise"),
        (resume, "trained"),
    ):
        assert main(arguments) == 2
        torch.set_deterministic_debug_mode("default")
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"25 weights in few bits, which cannot be {purpose} (among them model.blocks.0.attention.k" in line
        assert not (new / "checkpoints").exists() or not list((new / "checkpoints").iterdir())


def test_tensors_in_few_bits_that_do_not_fit_the_model_are_refused() -> None:
    def entries(*names: str) -> dict[str, TensorEntry]:
        return {name: TensorEntry(torch.uint8, (1, 1), ()) for name in names}

    experts = "blocks.1.ffn.experts"
    for saved, said in (
        (entries("blocks.0.attention_norm.weight.q"), "blocks.0.attention_norm.weight is in few bits, and no linear"),
        (entries("blocks.0.attention.q.weight.q"), "blocks.0.attention.q.weight.scale is missing"),
        (entries(f"{experts}.down.q", f"{experts}.down.scale"), f"{experts}.gate_up.q is missing"),
    ):
        with pytest.raises(ValueError, match=said):
            blank_quantized_(a_model(), saved)
    with pytest.raises(ValueError, match="spread over 2 ranks"):
        quantize_decoder_(cast(Any, SimpleNamespace(mesh=two_ranks())), FOUR)


def two_ranks() -> Any:
    one, two = SimpleNamespace(size=1), SimpleNamespace(size=2)
    return SimpleNamespace(world=two, expert=two, shard=one, tensor=one)


def a_profile(hessians: bool) -> Profile:
    """Of tokens that expert 3 saw none of, and expert 2 few."""
    tokens = [200, 100, 5, 0]
    inputs = [drawn(64, count, seed=count).double() for count in tokens]
    hidden = [drawn(32, count, seed=count + 1).double() for count in tokens]
    layer = {
        "routed_E": torch.tensor(tokens).double(),
        "input_sq_ED": torch.stack([x.square().sum(1) for x in inputs]),
        "hidden_sq_EF": torch.stack([h.square().sum(1) for h in hidden]),
    }
    sums = {"hessian_in_DD": inputs, "hessian_hidden_FF": hidden}

    class InMemory(Profile):
        def hessian(self, layer: int, expert: int, which: str) -> Tensor:
            assert hessians
            return (sums[which][expert] @ sums[which][expert].T).float()

    shape = a_plan().shape
    return InMemory("whole", shape, {}, ProfileConfig(hessians=hessians), ({}, layer, layer))


STATE = {f"model.{name}": tensor.detach() for name, tensor in a_model().named_parameters()}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_d2_slimming_a_checkpoint_makes_zeros_among_experts_and_leaves_all_else(method: Method) -> None:
    profile = a_profile(method == "sparsegpt")
    changed = change_state(STATE, a_plan(slim=Slim(method=method, pattern="2:4"), profile=profile.fingerprint), profile)
    assert changed.keys() == STATE.keys()
    for name, tensor in changed.items():
        if ".experts." in name:
            assert (tensor.unflatten(-1, (-1, 4)) == 0).sum(-1).eq(2).all(), name
            assert tensor.isfinite().all()
        else:
            assert torch.equal(tensor, STATE[name]), name


def test_zeros_of_slimming_are_zeros_in_few_bits() -> None:
    changed = change_state(STATE, a_plan(slim=Slim(method="magnitude"), quantize=FOUR))
    for name in ("model.blocks.2.ffn.experts.gate_up", "model.blocks.1.ffn.experts.down"):
        back = dequantize(changed[f"{name}.q"], changed[f"{name}.scale"])
        expected = slim(STATE[name], Slim(method="magnitude"))
        assert (back[expected == 0] == 0).all()
        assert off(back, expected) < 0.1


def test_with_sums_of_inputs_experts_are_rounded_by_gptq_and_the_rest_to_the_nearest() -> None:
    profile = a_profile(True)
    plan = a_plan(quantize=FOUR, profile=profile.fingerprint)
    changed, plain = change_state(STATE, plan, profile), change_state(STATE, plan)
    assert changed.keys() == plain.keys()
    differ = {name for name, tensor in changed.items() if not torch.equal(tensor, plain[name])}
    assert {name for name in differ if name.endswith(".q")} == {f"{name}.q" for name in STATE if ".experts." in name}
    name = "model.blocks.1.ffn.experts.down"
    by_hand = gptq(STATE[name][0], profile.hessian(1, 0, "hessian_hidden_FF"), FOUR)
    assert torch.equal(changed[f"{name}.q"][0], by_hand[0])


def test_experts_judged_by_their_layer_are_told() -> None:
    profile = a_profile(False)
    change = weight_change(a_plan(slim=Slim(), profile=profile.fingerprint), profile)
    assert change is not None
    for expert in range(4):
        change(Place(1, "expert", "gate_up", expert), "w", STATE["model.blocks.1.ffn.experts.gate_up"][expert])
    assert change.starved == {1: {2, 3}}


def test_what_a_plan_needs_of_a_profile_is_asked_for_before_anything_is_changed() -> None:
    profile = a_profile(False)
    assert weight_change(a_plan()) is None
    for plan, found, said in (
        (a_plan(slim=Slim()), None, "wanda needs the profile that the plan was made with"),
        (a_plan(slim=Slim()), profile, f"the plan rests on none, and this is {profile.fingerprint}"),
        (a_plan(slim=Slim(method="sparsegpt"), profile=profile.fingerprint), profile, "again with --hessians"),
    ):
        with pytest.raises(ValueError, match=said):
            weight_change(plan, found)
    change = weight_change(a_plan(quantize=FOUR))
    assert change is not None
    with pytest.raises(ValueError, match=r"w: is stored in torch.float8_e4m3fn, .* give it in bf16 or fp32"):
        change(Place(1, "attention", "q"), "w", torch.ones(32, 32).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="w: group: 32 does not divide the 48 inputs"):
        change(Place(1, "attention", "q"), "w", torch.ones(32, 48))


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
"""Of stock models whose weights have groups of 32 inputs."""


def stock_in_few_bits(family: str, how: Quantize, home: Path) -> tuple[Path, Path]:
    """A stock model, and what apply makes of it."""
    known = CONFIGS[family].to_dict()
    sizes: dict[str, Any] = {key: value for key, value in WIDE.items() if key in known}
    whole = save_stock(family, home / "whole", **sizes)
    (whole / "tokenizer.json").write_text("{}")
    plan = DropPlan(base=checkpoint_fingerprint(whole), shape=read_stock(whole).shape, quantize=how)
    apply_plan(whole, home / "few", plan, transform=weight_change(plan), shard_bytes=100_000)
    return whole, home / "few"


@pytest.mark.parametrize(("family", "how"), [*((family, FOUR) for family in CONFIGS), ("mixtral", EIGHT)])
def test_a_stock_export_holds_the_same_codes_in_the_order_of_compressed_tensors(
    family: str, how: Quantize, tmp_path: Path
) -> None:
    """Unpacked bit by bit, as the layout says: code i of a word from bit i * bits on, moved up by half the range."""
    _, few = stock_in_few_bits(family, how, tmp_path)
    done = export(open_folder(few), tmp_path / "out", shard_bytes=50_000)
    assert done.parameters == sum(tensor.numel() for tensor in StoredWeights(tmp_path / "whole").values())
    stored, made = StoredWeights(few), StoredWeights(tmp_path / "out")
    names = [name.removesuffix(".q") for name in stored if name.endswith(".q")]
    assert {name for name in made if name.endswith("_packed")} == {f"{name}_packed" for name in names}
    for name in names:
        words, per_word = made[f"{name}_packed"].numpy().view("uint32"), 32 // how.bits
        codes = [
            [(int(word) >> how.bits * i) % 2**how.bits - 2 ** (how.bits - 1) for word in row for i in range(per_word)]
            for row in words[:2]
        ]
        expected = dequantize(stored[f"{name}.q"], stored[f"{name}.scale"])
        scale = made[f"{name}_scale"]
        assert scale.dtype == torch.float32
        assert made[f"{name}_shape"].tolist() == list(expected.shape)
        found = torch.tensor(codes).unflatten(-1, (scale.size(-1), -1)) * scale[:2].unsqueeze(-1)
        assert torch.equal(found.flatten(-2), expected[:2])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    gates = {name for name in config["ignore"] if "gate" in name.split(".")[-1]}
    assert gates == {name.removesuffix(".weight") for name in made if name.endswith("gate.weight")}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def loaded(folder: Path) -> Tensor:
    """Logits of the model in `folder`, which stock transformers loads without a word of complaint."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        return model.eval()(torch.arange(24).view(2, 12)).logits


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="transformers reads the layout through the package compressed-tensors",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "how"), [*((family, FOUR) for family in CONFIGS), ("mixtral", EIGHT)])
def test_a_stock_export_loads_in_stock_transformers_and_computes_the_same(
    family: str, how: Quantize, tmp_path: Path
) -> None:
    whole, few = stock_in_few_bits(family, how, tmp_path)
    export(open_folder(few), tmp_path / "out")
    save_file(formed(few, whole), whole / "model.safetensors", {"format": "pt"})
    assert torch.equal(loaded(tmp_path / "out"), loaded(whole))


def formed(few: Path, whole: Path) -> dict[str, Tensor]:
    """The weights in `whole`, those in few bits in `few` as what these stand for."""
    stored, weights = StoredWeights(few), dict(StoredWeights(whole))
    for name in weights:
        if f"{name}.q" in stored:
            weights[name] = dequantize(stored[f"{name}.q"], stored[f"{name}.scale"])
    return weights


def test_inputs_that_fill_no_whole_words_are_refused() -> None:
    with pytest.raises(ValueError, match="w: 12 inputs fill no whole int32 of 8 codes"):
        packed_tensors("w", torch.zeros(2, 6, dtype=torch.uint8), torch.ones(2, 1), torch.float32)
