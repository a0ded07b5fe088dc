"""What `apply` leaves of a Hugging Face folder, tensor by tensor, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stock_models import CONFIGS, save_stock
from torch import Tensor
from transformers import AutoModelForCausalLM

from wastenot.moe.compress.apply import apply_plan
from wastenot.moe.compress.change import weight_change
from wastenot.moe.compress.compose import compose
from wastenot.moe.compress.fingerprint import checkpoint_fingerprint
from wastenot.moe.compress.places import FAMILIES, Place
from wastenot.moe.compress.plan import DropPlan, Quantize, Shape, Slim, write_plan
from wastenot.moe.compress.stored import read_stock
from wastenot.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 5


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of every family, with files that are no weights."""
    home = tmp_path_factory.mktemp("stock")
    made = {family: save_stock(family, home / family, num_hidden_layers=LAYERS) for family in CONFIGS}
    for folder in made.values():
        (folder / "tokenizer.json").write_text("{}")
        (folder / "notes.txt").write_text("not the model's")
    return made


def plan_of(folder: Path, **what: Any) -> DropPlan:
    return DropPlan(base=checkpoint_fingerprint(folder), shape=read_stock(folder).shape, **what)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def everything(folder: Path) -> DropPlan:
    """A plan that drops a block, a layer, and experts of the layers behind it; two of each group."""
    shape = read_stock(folder).shape
    gone = (1, 2, 4, 7) if shape.groups > 1 else (0, 3)
    gone = gone if shape.groups == 1 else (1, 2, 4, 7)
    order = {4: (5, 4, 2, 1)} if shape.groups == 1 else {4: (3, 0, 6, 5)}
    return plan_of(folder, blocks=(1,), layers=(2,), experts={3: gone, 4: gone}, order=order)


def expected_of(tensors: dict[str, Tensor], plan: DropPlan) -> dict[str, Tensor]:
    """By hand, on names alone: what the plan leaves."""
    left: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if found is None:
            left[name] = tensor
            continue
        layer, rest = int(found[1]), found[2]
        if layer in plan.blocks:
            continue
        if layer in plan.layers and not rest.startswith(("input_layernorm", "self_attn")):
            continue
        new = layer - len([block for block in plan.blocks if block < layer])
        kept = plan.kept(layer)
        if expert := re.search(r"experts\.(\d+)\.", rest):
            if int(expert[1]) not in kept:
                continue
            rest = rest.replace(expert[0], f"experts.{kept.index(int(expert[1]))}.")
        if re.search(r"(mlp|block_sparse_moe)\.gate\.", rest):
            tensor = tensor[list(kept)]
        left[f"model.layers.{new}.{rest}"] = tensor
    return left


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_a_plan_leaves_is_there_bit_by_bit(stock: dict[str, Path], family: str, tmp_path: Path) -> None:
    plan, target = everything(stock[family]), tmp_path / "target"
    heard: list[tuple[int, int]] = []
    done = apply_plan(
        stock[family], target, plan, shard_bytes=4096, progress=lambda done, total: heard.append((done, total))
    )
    found = tensors_in(target)
    assert_same(found, expected_of(tensors_in(stock[family]), plan))
    assert done.files == len(list(target.glob("*.safetensors"))) > 3
    assert done.reused == 0
    assert all(file.stat().st_size < 4096 + 4096 for file in target.glob("*.safetensors"))
    assert done.bytes_after == sum(tensor.numel() * 4 for tensor in found.values()) == heard[-1][0] == heard[-1][1]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == done.bytes_after
    after = read_stock(target)
    assert (after.shape, done.shape) == (plan.result, plan.result)
    assert (after.origin, after.plans) == ((0, 2, 3, 4), (plan.hash,))
    assert done.fingerprint == checkpoint_fingerprint(target) != plan.base
    # No stock loader may take it for a whole model.
    assert not (target / "config.json").exists()
    assert (target / "base_config.json").read_text() == (stock[family] / "config.json").read_text()
    assert (target / "tokenizer.json").is_file()
    assert not (target / "notes.txt").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_go_are_bypassed_and_no_more(stock: dict[str, Path], family: str, tmp_path: Path) -> None:
    """transformers computes with what is left what it computes with the whole, blocks 2 and 3 passed over."""
    apply_plan(stock[family], tmp_path / "target", plan_of(stock[family], blocks=(2, 3)))
    changes: dict[str, Any] = {"num_hidden_layers": LAYERS - 2}
    if family == "qwen2_moe":
        changes["layer_types"] = ["full_attention"] * (LAYERS - 2)
    assert torch.equal(stock_logits(tmp_path / "target", changes), bypassed(stock[family], (2, 3), tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_go_are_those_whose_rows_go(stock: dict[str, Path], family: str, tmp_path: Path) -> None:
    """Routers choose among the others as if the logits of those that went were minus infinity."""
    shape = read_stock(stock[family]).shape
    gone = {0: (1, 2), 1: (0, 3), 2: (4, 5), 3: (2, 5), 4: (1, 4)}
    if shape.groups > 1:
        gone = {1: (0, 5), 2: (3, 4), 3: (1, 7), 4: (2, 6)}
    gone = {layer: experts for layer, experts in gone.items() if shape.experts[layer]}
    plan = plan_of(stock[family], experts=gone)
    apply_plan(stock[family], tmp_path / "target", plan)
    key = {"mixtral": "num_local_experts", "deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts"}
    left = max(plan.result.experts)
    found = stock_logits(tmp_path / "target", {key.get(family, "num_experts"): left})
    expected = logits_of(stock[family], masked=gone)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    whole = logits_of(stock[family], masked={})
    assert (whole - expected).abs().max() > 1e-2 * expected.abs().max(), "the drop itself shows"


TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def stock_logits(compressed: Path, changes: dict[str, Any]) -> Tensor:
    """What transformers computes with the tensors in `compressed`, which must be all that it wants."""
    folder = compressed.with_name("loadable")
    shutil.copytree(compressed, folder)
    config = json.loads((folder / "base_config.json").read_text()) | changes
    if "num_experts" in changes:
        config.pop("num_local_experts", None)
    (folder / "config.json").write_text(json.dumps(config))
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    return model(TOKENS).logits.detach()


def bypassed(folder: Path, blocks: tuple[int, ...], tmp_path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers = torch.nn.ModuleList(
        block for number, block in enumerate(model.model.layers) if number not in blocks
    )
    for number, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = number
    model.config.num_hidden_layers = model.model.config.num_hidden_layers = len(model.model.layers)
    return model(TOKENS, use_cache=False).logits.detach()


def logits_of(folder: Path, masked: dict[int, tuple[int, ...]]) -> Tensor:
    """Of the whole model, whose routers give some experts no chance."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer, gone in masked.items():
        gate = model.model.layers[layer].mlp.gate
        if "e_score_correction_bias" in dict(gate.named_buffers()):
            gate.e_score_correction_bias[list(gone)] = -1e4
        else:
            mask_rows(gate, list(gone))
    return model(TOKENS, use_cache=False).logits.detach()


def mask_rows(gate: torch.nn.Module, rows: list[int]) -> None:
    """Wraps the linear map inside a router: logits of `rows` become minus infinity."""
    forward = gate.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        linear = torch.nn.functional.linear

        def with_mask(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            logits = linear(x, weight, bias)
            logits[..., rows] = -torch.inf
            return logits

        torch.nn.functional.linear = with_mask
        try:
            return forward(*args, **kwargs)
        finally:
            torch.nn.functional.linear = linear

    gate.forward = masked


def test_d7_experts_behind_a_dropped_layer_are_the_right_ones(stock: dict[str, Path], tmp_path: Path) -> None:
    """The public code counts a dropped layer as -1 experts, and cuts others in every layer behind it."""
    plan = plan_of(stock["olmoe"], layers=(0, 2), experts={1: (0,), 3: (2, 3), 4: (1,)})
    apply_plan(stock["olmoe"], tmp_path / "target", plan)
    before, after = tensors_in(stock["olmoe"]), tensors_in(tmp_path / "target")
    for layer, kept in {1: [1, 2, 3, 4, 5], 3: [0, 1, 4, 5], 4: [0, 2, 3, 4, 5]}.items():
        stem = f"model.layers.{layer}.mlp"
        assert torch.equal(after[f"{stem}.gate.weight"], before[f"{stem}.gate.weight"][kept])
        for new, old in enumerate(kept):
            name = "{}.experts.{}.down_proj.weight"
            assert torch.equal(after[name.format(stem, new)], before[name.format(stem, old)])


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_d9_a_dropped_layer_keeps_neither_norm_nor_shared_experts(
    stock: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """The public code leaves x + norm(x) where no expert is left, and forgets what shared experts were."""
    apply_plan(stock[family], tmp_path / "target", plan_of(stock[family], layers=(2,)))
    left = [name for name in tensors_in(tmp_path / "target") if name.startswith("model.layers.2.")]
    assert left
    assert all(".input_layernorm." in name or ".self_attn." in name for name in left)


def test_d10_a_second_layer_drop_names_only_layers_that_are_left(stock: dict[str, Path], tmp_path: Path) -> None:
    """The public code goes by all MoE layers, and looks for a module that is gone."""
    source, once = stock["qwen3_moe"], tmp_path / "once"
    apply_plan(source, once, plan_of(source, blocks=(0,), layers=(2,)))
    with pytest.raises(ValueError, match="layers: 1 has no feed-forward network"):
        plan_of(once, layers=(1,))
    apply_plan(once, tmp_path / "twice", plan_of(once, layers=(2,)))
    after = read_stock(tmp_path / "twice")
    assert (after.shape.experts, after.origin) == ((6, 0, 0, 6), (1, 2, 3, 4))
    assert len(after.plans) == 2
    assert_same(
        tensors_in(tmp_path / "twice"),
        expected_of(tensors_in(source), plan_of(source, blocks=(0,), layers=(2, 3))),
    )


def test_d11_dense_layers_are_counted_among_what_is_left(stock: dict[str, Path], tmp_path: Path) -> None:
    """The public code leaves `first_k_dense_replace` and `mlp_only_layers` as they are."""
    for family in ("deepseek_v2", "qwen2_moe"):
        apply_plan(stock[family], tmp_path / family, plan_of(stock[family], blocks=(0, 3)))
        after = read_stock(tmp_path / family).shape
        assert (after.dense, after.experts) == ((), (max(after.experts),) * 3)
        apply_plan(stock[family], tmp_path / f"{family}-2", plan_of(stock[family], blocks=(2,)))
        assert read_stock(tmp_path / f"{family}-2").shape.dense == (0,)


def test_skipped_experts_keep_their_rows_and_give_nothing(stock: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(stock["mixtral"], experts={1: (0, 5)}, semantics="skip", order={1: (5, 4, 3, 2, 1, 0)})
    done = apply_plan(stock["mixtral"], tmp_path / "target", plan)
    assert done.shape == plan.shape
    before, after = tensors_in(stock["mixtral"]), tensors_in(tmp_path / "target")
    name = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    for old in range(6):
        new = 5 - old
        assert torch.equal(after[name.format(new, "w1")], before[name.format(old, "w1")])
        down = after[name.format(new, "w2")]
        assert torch.equal(down, before[name.format(old, "w2")] * (0 if old in (0, 5) else 1))
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.equal(after[gate], before[gate].flip(0))


def test_layers_that_predict_further_tokens_stay_behind_the_last(tmp_path: Path) -> None:
    source = save_stock("deepseek_v3", tmp_path / "source", num_hidden_layers=3)
    tensors = tensors_in(source)
    behind = {
        name.replace("layers.2.", f"layers.{layer}."): tensor + layer
        for name, tensor in tensors.items()
        if name.startswith("model.layers.2.")
        for layer in (3, 4)
    }
    behind |= {f"model.layers.{layer}.eh_proj.weight": torch.full((16, 32), float(layer)) for layer in (3, 4)}
    save_file(tensors | behind, source / "model.safetensors", {"format": "pt"})
    apply_plan(source, tmp_path / "target", plan_of(source, blocks=(1,), experts={2: (0, 4)}))
    after = tensors_in(tmp_path / "target")
    for name, tensor in behind.items():
        layer = int(name.split(".")[2])
        assert torch.equal(after[name.replace(f"layers.{layer}.", f"layers.{layer - 1}.")], tensor)
    assert not [name for name in after if name.startswith("model.layers.4.")]
    assert read_stock(tmp_path / "target").shape.layers == 2


def nothing_beside(tmp_path: Path, before: set[str]) -> bool:
    return {path.name for path in tmp_path.iterdir()} == before


Damage = Callable[[Path], object]


def without(name: str) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut_short(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate((folder / "model.safetensors").stat().st_size - 1)


def with_unknown(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.gates.weight": torch.zeros(1)}, folder / "model.safetensors")


def with_wide_router(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.gate.weight": torch.zeros(7, 16)}, folder / "model.safetensors")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "cut short": (cut_short, r"model\.safetensors: has \d+ bytes instead of \d+"),
    "no header": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "is cut short, or is no saf"),
    "unknown": (with_unknown, r"model\.layers\.0\.mlp\.gates\.weight"),
    "expert": (without("model.layers.3.mlp.experts.5.up_proj.weight"), "layer 3 lacks up of expert 5"),
    "router": (without("model.layers.3.mlp.gate.weight"), "layer 3 lacks its router"),
    "norm": (without("model.layers.3.post_attention_layernorm.weight"), "layer 3 lacks its norm"),
    "rows": (with_wide_router, "is of 7 experts, but its layer should have 6"),
    "family": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
        "'llama' cannot be compressed; supported are mixtral",
    ),
    "no folder": (shutil.rmtree, "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_one_clear_line_and_nothing_is_written(stock: dict[str, Path], kind: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(stock["olmoe"], tmp_path / "source"))
    damage, message = DAMAGES[kind]
    plan = plan_of(source, blocks=(1,))
    damage(source)
    if kind not in ("cut short", "no header", "family", "no folder"):
        plan = replace(plan, base=checkpoint_fingerprint(source))
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message) as error:
        apply_plan(source, tmp_path / "target", plan)
    assert "\n" not in str(error.value)
    assert nothing_beside(tmp_path, before)


def test_a_plan_for_another_checkpoint_is_refused(stock: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(stock["olmoe"], blocks=(1,))
    with pytest.raises(ValueError, match="base: the plan was made for"):
        apply_plan(stock["qwen3_moe"], tmp_path / "target", plan)
    wrong = replace(plan, shape=replace(plan.shape, top_k=1))
    with pytest.raises(ValueError, match="shape: the plan says"):
        apply_plan(stock["olmoe"], tmp_path / "target", wrong)
    assert not list(tmp_path.iterdir())


def test_a_target_that_holds_something_is_refused(stock: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    plan = plan_of(stock["olmoe"], blocks=(1,))
    apply_plan(stock["olmoe"], tmp_path / "target", plan)
    before = bytes_in(tmp_path)
    with pytest.raises(ValueError, match="target: exists; name a new folder"):
        apply_plan(stock["olmoe"], tmp_path / "target", plan)
    assert bytes_in(tmp_path) == before


def test_slimming_goes_through_the_hook_matrix_by_matrix(stock: dict[str, Path], tmp_path: Path) -> None:
    source = stock["qwen2_moe"]
    plan = plan_of(source, blocks=(1,), experts={2: (0,)}, slim=Slim(method="magnitude"), quantize=Quantize())
    with pytest.raises(ValueError, match="slim: this plan changes weights"):
        apply_plan(source, tmp_path / "target", plan)
    with pytest.raises(ValueError, match="quantize: this plan changes weights"):
        apply_plan(source, tmp_path / "target", replace(plan, slim=None))
    assert not list(tmp_path.iterdir())
    seen: dict[str, Place] = {}

    def halve(place: Place, name: str, tensor: Tensor) -> dict[str, Tensor]:
        assert tensor.dim() == 2
        seen[name] = place
        return {f"{name}_packed": (tensor * 2).to(torch.int8), f"{name}_scale": tensor[:, :1]}

    apply_plan(source, tmp_path / "target", plan, transform=halve)
    before, after = tensors_in(source), tensors_in(tmp_path / "target")
    # In the target it is expert 0 of layer 1, in the source it was 1 of 2.
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert seen[name] == Place(2, "expert", "up", 1)
    original = before["model.layers.2.mlp.experts.1.up_proj.weight"]
    assert torch.equal(after[f"{name}_packed"], (original * 2).to(torch.int8))
    assert name not in after
    untouched = [name for name in after if not name.endswith(("_packed", "_scale"))]
    kinds = ("norm.weight", "gate.weight", "embed_tokens.weight", "lm_head.weight", "proj.bias")
    assert all(name.endswith((*kinds, "shared_expert_gate.weight")) for name in untouched)
    assert any(name.endswith("shared_expert_gate.weight") for name in untouched)


CHILD = """
import os, signal, sys
from wastenot.moe.compress.apply import apply_plan
from wastenot.moe.compress.plan import read_plan
import wastenot.moe.compress.writing as writing

source, plan, target, after, where = sys.argv[1:]
count, save = 0, writing.save_file

def progress(done, total):
    global count
    count += 1
    if where == "between" and count == int(after):
        os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path, metadata):
    save(tensors, path, metadata)
    if where == "within" and count == int(after):
        with open(path, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)

writing.save_file = half
apply_plan(source, target, read_plan(plan), shard_bytes=4096, progress=progress)
"""


@pytest.mark.parametrize(("after", "where"), [(1, "between"), (4, "between"), (0, "within"), (5, "within")])
def test_killed_and_started_again_it_makes_the_same_bytes(
    stock: dict[str, Path], after: int, where: str, tmp_path: Path
) -> None:
    source = stock["qwen2_moe"]
    plan = everything(source)
    write_plan(plan, tmp_path / "plan.yaml")
    whole = apply_plan(source, tmp_path / "whole", plan, shard_bytes=4096)
    target, partial = tmp_path / "target", tmp_path / ".target.partial"
    arguments = [source, tmp_path / "plan.yaml", target, after, where]
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert partial.is_dir()
    assert not target.exists()
    stamps = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    again = apply_plan(source, target, plan, shard_bytes=4096)
    assert bytes_in(target) == bytes_in(tmp_path / "whole")
    assert (again.reused, again.files) == (after, whole.files)
    files = sorted(target.glob("*.safetensors"))[:after]
    assert all(stamps[path.name] == path.stat().st_mtime_ns for path in files), "written once"
    assert not partial.exists()


def test_what_another_plan_began_is_thrown_away(stock: dict[str, Path], tmp_path: Path) -> None:
    source = stock["olmoe"]
    one, other = plan_of(source, blocks=(1,)), plan_of(source, blocks=(2,))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for shard_bytes in (4096, 8192):
        with pytest.raises(KeyboardInterrupt):
            apply_plan(source, tmp_path / "target", one, shard_bytes=shard_bytes, progress=stop)
        assert (tmp_path / ".target.partial").is_dir()
    slims = replace(other, slim=Slim(method="magnitude"))

    class Change:
        def __init__(self, rests_on: str) -> None:
            self.rests_on = rests_on

        def __call__(self, place: Place, name: str, tensor: Tensor) -> dict[str, Tensor]:
            return {name: tensor}

    with pytest.raises(KeyboardInterrupt):
        apply_plan(source, tmp_path / "target", slims, transform=Change("one"), shard_bytes=4096, progress=stop)
    again = apply_plan(source, tmp_path / "target", slims, transform=Change("other"), shard_bytes=4096)
    assert again.reused == 0, "of another profile"
    shutil.rmtree(tmp_path / "target")
    done = apply_plan(source, tmp_path / "target", other, shard_bytes=4096)
    assert done.reused == 0
    assert_same(tensors_in(tmp_path / "target"), expected_of(tensors_in(source), other))


MEASURE = """
import resource, sys
from wastenot.moe.compress.apply import apply_plan
from wastenot.moe.compress.plan import read_plan
source, plan, target, shard_bytes = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
apply_plan(source, target, read_plan(plan), shard_bytes=int(shard_bytes))
print(peak() - before)
"""


def test_memory_holds_a_few_files_worth_and_no_more(tmp_path: Path) -> None:
    """A checkpoint of 190 MB in two files, written in files of 8 MB."""
    source = save_stock(
        "mixtral",
        tmp_path / "source",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=10,
        max_shard_size="100MB",
    )
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size > 180e6
    write_plan(plan_of(source, experts={2: (1,)}), tmp_path / "plan.yaml")
    arguments = [source, tmp_path / "plan.yaml", tmp_path / "target", 8 * 2**20]
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40e6


def test_fingerprints_are_of_weights_and_not_of_files(stock: dict[str, Path], tmp_path: Path) -> None:
    base = checkpoint_fingerprint(stock["olmoe"])
    split = save_stock("olmoe", tmp_path / "split", num_hidden_layers=LAYERS, max_shard_size="10KB")
    assert len(list(split.glob("*.safetensors"))) > 2
    assert checkpoint_fingerprint(split) == base
    config = json.loads((split / "config.json").read_text())
    (split / "config.json").write_text(json.dumps(config | {"transformers_version": "4.0"}))
    assert checkpoint_fingerprint(split) == base
    (split / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert checkpoint_fingerprint(split) != base
    other = Path(shutil.copytree(stock["olmoe"], tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    last = tensors["model.layers.4.mlp.experts.5.down_proj.weight"]
    last[-1, -1] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert checkpoint_fingerprint(other) != base
    with pytest.raises(ValueError, match="neither model"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
        checkpoint_fingerprint(tmp_path / "empty")


@st.composite
def plans(draw: st.DrawFn, base: str, shape: Shape, semantics: str) -> DropPlan:
    """Some plan for a checkpoint of that shape."""
    layers = list(range(shape.layers))
    blocks = draw(st.sets(st.sampled_from(layers), max_size=shape.layers - 1))
    feeds = [layer for layer in layers if layer not in blocks and (shape.experts[layer] or layer in shape.dense)]
    dropped = draw(st.sets(st.sampled_from(feeds), max_size=2)) if feeds else set()
    experts: dict[int, tuple[int, ...]] = {}
    order: dict[int, tuple[int, ...]] = {}
    for layer in sorted(set(shape.moe_layers) - blocks - dropped):
        count = shape.experts[layer]
        width = count // shape.groups
        least = -(-shape.top_k // shape.top_groups)
        number = draw(st.integers(0, width - least if semantics == "reroute" else width))
        gone = [
            group * width + expert
            for group in range(shape.groups)
            for expert in draw(st.permutations(range(width)))[:number]
        ]
        if gone:
            experts[layer] = tuple(sorted(gone))
        kept = [expert for expert in range(count) if expert not in gone or semantics == "skip"]
        if draw(st.booleans()):
            each = len(kept) // shape.groups
            groups = [kept[first : first + each] for first in range(0, len(kept), each)]
            order[layer] = tuple(expert for group in groups for expert in draw(st.permutations(group)))
    return DropPlan(
        base=base,
        shape=shape,
        blocks=tuple(sorted(blocks)),
        layers=tuple(sorted(dropped)),
        experts=experts,
        semantics=semantics,  # pyright: ignore[reportArgumentType]
        order=order,
    )


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("semantics", ["reroute", "skip"])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_plan_after_another_is_their_composition(
    stock: dict[str, Path], family: str, semantics: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source, home = stock[family], tmp_path_factory.mktemp("compose")
    first = data.draw(plans(checkpoint_fingerprint(source), read_stock(source).shape, semantics))
    once = apply_plan(source, home / "once", first)
    second = data.draw(plans(once.fingerprint, once.shape, semantics))
    twice = apply_plan(home / "once", home / "twice", second)
    both = apply_plan(source, home / "both", compose(first, second))
    assert (home / "both" / "model.safetensors").read_bytes() == (home / "twice" / "model.safetensors").read_bytes()
    assert (both.shape, both.fingerprint) == (twice.shape, twice.fingerprint)
    assert read_stock(home / "both").origin == read_stock(home / "twice").origin


def test_some_plans_have_no_composition() -> None:
    shape = Shape(experts=(4, 4), top_k=1)
    cuts = DropPlan(base="a", shape=shape, experts={0: (1,)})
    skips = DropPlan(base="b", shape=cuts.result, experts={1: (0,)}, semantics="skip")
    with pytest.raises(ValueError, match="semantics: experts of layer 0 go and those of layer 1 are skipped"):
        compose(cuts, skips)
    with pytest.raises(ValueError, match="shape: the second plan is for"):
        compose(cuts, replace(skips, shape=shape))
    with pytest.raises(ValueError, match="slim: the second plan rests on a profile"):
        compose(cuts, DropPlan(base="b", shape=cuts.result, slim=Slim()))
    with pytest.raises(ValueError, match="quantize: the second plan rests on a profile"):
        compose(cuts, DropPlan(base="b", shape=cuts.result, quantize=Quantize(), profile="sums of x x^T"))
    with pytest.raises(ValueError, match="quantize: nothing can be cut"):
        compose(replace(cuts, quantize=Quantize()), DropPlan(base="b", shape=cuts.result))
    # What is skipped first and cut then is cut.
    again = compose(
        DropPlan(base="a", shape=shape, experts={0: (1,)}, semantics="skip"),
        DropPlan(base="b", shape=shape, experts={0: (1, 2)}, criteria={"experts": "reap"}),
    )
    assert (again.semantics, again.experts, again.criteria) == ("reroute", {0: (1, 2)}, {"experts": "reap"})


def test_the_command_applies_and_says_what_is_left(
    stock: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = stock["qwen3_moe"], tmp_path / "target"
    plan = plan_of(source, blocks=(1,), layers=(3,))
    write_plan(plan, tmp_path / "plan.yaml")
    arguments = ["compress", "apply", str(source), str(tmp_path / "plan.yaml"), str(target), "--shard-size", "4KiB"]
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fingerprint"] == checkpoint_fingerprint(target)
    assert (said["experts"], said["plan"], said["state_left_out"]) == ([6, 6, 0, 6], plan.hash, [])
    assert said["bytes"] < said["bytes_before"]
    shutil.rmtree(target)
    assert main(arguments) == 0
    assert "4 of 5 blocks, 3 of 5 MoE layers, 18 of 30 experts" in capsys.readouterr().out


def test_the_command_slims_and_quantizes_by_the_plan(
    stock: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = stock["mixtral"], tmp_path / "target"
    write_plan(plan_of(source, slim=Slim(method="magnitude")), tmp_path / "slim.yaml")
    assert main(["compress", "apply", str(source), str(tmp_path / "slim.yaml"), str(target)]) == 0
    down = tensors_in(target)["model.layers.1.block_sparse_moe.experts.0.w2.weight"]
    assert torch.equal((down == 0).sum(1), torch.full((16,), 4))
    write_plan(plan_of(source, slim=Slim(method="wanda"), profile="0" * 16), tmp_path / "wanda.yaml")
    capsys.readouterr()
    assert main(["compress", "apply", str(source), str(tmp_path / "wanda.yaml"), str(tmp_path / "other")]) == 2
    assert "wanda needs the profile that the plan was made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"quantize": Quantize(bits=4, group=16)}, "group: 16 does not divide the 24 inputs of a weight; use bits: 8"),
        ({"slim": Slim(method="magnitude", pattern="2:4")}, "pattern: 2:4 does not fit rows of 18 inputs"),
    ],
)
def test_matrices_that_cannot_be_changed_are_refused_before_anything_is_written(
    what: dict[str, Any], message: str, tmp_path: Path
) -> None:
    width = 24 if "quantize" in what else 18
    source = save_stock("olmoe", tmp_path / "source", intermediate_size=width)
    plan = plan_of(source, **what)
    with pytest.raises(ValueError, match=message):
        apply_plan(source, tmp_path / "target", plan, transform=weight_change(plan), shard_bytes=4096)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_in_few_bits_is_refused(stock: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(stock["olmoe"], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight.q"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds weights in few bits \(.*q_proj\.weight\.q\); apply plans to what was"):
        apply_plan(source, tmp_path / "target", plan_of(source, blocks=(1,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "nowhere"}, "nowhere/config.json: cannot be read"),
        ({1: "nowhere.yaml"}, "nowhere.yaml: cannot be read as a plan"),
        ({2: "."}, "exists; name a new folder"),
        ({3: "many"}, "--shard-size: 'many'"),
        ({2: "plan.yaml/target"}, "cannot be written"),
    ],
)
def test_bad_input_of_the_command_is_one_line_and_exit_code_2(
    stock: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[int, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_plan(plan_of(stock["olmoe"], blocks=(1,)), tmp_path / "plan.yaml")
    words = [str(stock["olmoe"]), "plan.yaml", "target", "1GiB"]
    words = [change.get(place, word) for place, word in enumerate(words)]
    assert main(["compress", "apply", *words[:3], "--shard-size", words[3]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
