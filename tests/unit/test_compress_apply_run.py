"""`apply` to runs of ours: weights and the optimizer's state that go along, and training that goes on from there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from wastenot.launch.compressed_run import apply_plan
from wastenot.launch.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoopConfig,
    ScheduleConfig,
    TrainConfig,
)
from wastenot.launch.corpus import prepare_files
from wastenot.launch.optimizer_config import OptimizerConfig
from wastenot.launch.run_folder import RunFolder
from wastenot.launch.saved_run import open_run
from wastenot.launch.settings import dump_config
from wastenot.moe.compress.apply import apply_plan as apply_to_checkpoint
from wastenot.moe.compress.change import weight_change
from wastenot.moe.compress.fingerprint import checkpoint_fingerprint, newest_checkpoint
from wastenot.moe.compress.places import Place
from wastenot.moe.compress.plan import DropPlan, Quantize, Slim
from wastenot.moe.compress.shapes import shape_of_model
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import Decoder
from wastenot.moe.layer import MoELayer
from wastenot.parallel.checkpoint import verify
from wastenot.parallel.config import ParallelConfig, RecomputeConfig
from wastenot.parallel.manifest import Chunk, read_manifest, write_manifest
from wastenot.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = ("adamw", "adapprox", "adafactor", "adamw8bit", "came", "muon")
TEXT = "".join(f"{i} green bottles, hanging on the wall; {i} green bottles, standing.\n" for i in range(120))
MODEL = ModelConfig(
    vocab_size=257,
    d_model=32,
    layers=5,
    heads=4,
    d_ff=48,
    init_std=0.2,
    moe=MoEConfig(experts=6, d_expert=16, shared_experts=1, first_dense=1),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that trained for three steps, by their optimizer."""
    home = tmp_path_factory.mktemp("runs")
    (home / "bottles.txt").write_text(TEXT)
    data = DataConfig(dir=str(home / "data"), tokenizer="bytes", seq_len=32, val_fraction=0.2)
    folder = prepare_files([home / "bottles.txt"], data, progress=False)
    made: dict[str, Path] = {}
    for name in OPTIMIZERS:
        config = TrainConfig(
            model=MODEL,
            router=RouterConfig(top_k=2, bias_update=0.001),
            data=replace(data, corpus=str(folder)),
            optimizer=OptimizerConfig(name=name),
            schedule=ScheduleConfig(warmup_steps=1),
            train=LoopConfig(steps=3, batch=2, eval_batch=2, eval_every=0, sample_tokens=0),
            checkpoint=CheckpointConfig(every=1),
            log=LogConfig(dir=str(home / name)),
        )
        (home / f"{name}.yaml").write_text(dump_config(config))
        assert main(["train", str(home / f"{name}.yaml")]) == 0
        made[name] = home / name
    return made


def plan_of(run: Path, **what: Any) -> DropPlan:
    config = RunFolder(run).load_config()
    shape = shape_of_model(config.model, config.router)
    return DropPlan(base=checkpoint_fingerprint(run), shape=shape, **what)


def everything(run: Path) -> DropPlan:
    return plan_of(run, blocks=(1,), layers=(2,), experts={3: (0, 5), 4: (2,)}, order={4: (5, 4, 3, 1, 0)})


def tensors_in(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, put together from its chunks."""
    folder = newest_checkpoint(run)
    manifest, found = read_manifest(folder), {}
    for name, entry in manifest.tensors.items():
        found[name] = torch.full(entry.shape, -7, dtype=entry.dtype)
        for chunk in entry.chunks:
            box = tuple(slice(start, start + size) for start, size in zip(chunk.offset, chunk.shape, strict=True))
            with safe_open(folder / chunk.file, framework="pt") as file:
                found[name][box] = file.get_tensor(name)
    return found


def logits_of(model: Decoder) -> Tensor:
    tokens_BS = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.logits(model(tokens_BS).hidden_BSD)


@pytest.mark.parametrize("shard_bytes", [2**30, 6000])
@pytest.mark.parametrize("optimizer", ["adamw", "adapprox"])
def test_weights_and_state_of_what_is_left_go_along(
    runs: dict[str, Path], optimizer: str, shard_bytes: int, tmp_path: Path
) -> None:
    run, target = runs[optimizer], tmp_path / "target"
    plan = everything(run)
    done = apply_plan(run, target, plan, shard_bytes=shard_bytes)
    before, after = tensors_in(run), tensors_in(target)
    expected: dict[str, Tensor] = {}
    left_out: set[str] = set()
    for name, tensor in before.items():
        parts = name.split(".")
        if ".blocks." not in name:
            expected[name] = tensor
            continue
        at = parts.index("blocks") + 1
        layer, rest = int(parts[at]), ".".join(parts[at + 1 :])
        if layer in plan.blocks or (layer in plan.layers and rest.startswith("ffn")):
            continue
        kept = list(plan.kept(layer))
        if rest.startswith(("ffn.router", "ffn.experts")) and len(kept) < 6:
            router = f"blocks.{layer}.ffn.router.weight"
            if name.startswith(f"optimizer.{router}.") and f"optimizer.{router}.Q" in before:
                left_out.add(router)
                continue
            tensor = tensor[kept] if tensor.dim() else tensor
        parts[at] = str(layer - (layer > 1))
        expected[".".join(parts)] = tensor
    assert after.keys() == expected.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, expected[name]), name
    assert set(done.state_left_out) == left_out
    assert bool(left_out) == (optimizer == "adapprox")
    assert any(name.startswith("optimizer.") and ".experts." in name for name in after)
    assert (done.files > 4) == (shard_bytes == 6000)
    # Every byte, by the sums of the manifest.
    assert verify(newest_checkpoint(target)).step == 3
    assert sorted(path.name for path in target.iterdir()) == ["checkpoints", "config.yaml", "tokenizer"]


def test_stacks_larger_than_a_file_are_cut_between_experts(runs: dict[str, Path], tmp_path: Path) -> None:
    apply_plan(runs["adamw"], tmp_path / "target", everything(runs["adamw"]), shard_bytes=6000)
    folder = newest_checkpoint(tmp_path / "target")
    stack = read_manifest(folder).tensors["model.blocks.2.ffn.experts.gate_up"]
    assert [(chunk.offset, chunk.shape) for chunk in stack.chunks] == [
        ((expert, 0, 0), (1, 32, 32)) for expert in range(4)
    ]
    assert max(path.stat().st_size for path in folder.glob("*.safetensors")) < 35000, "the embedding, one matrix"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_from_what_is_left(
    runs: dict[str, Path], optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the state of some parameters stayed behind: the optimizer makes it anew."""
    target = tmp_path / "target"
    done = apply_plan(runs[optimizer], target, everything(runs[optimizer]))
    routers = [f"blocks.{layer}.ffn.router.weight" for layer in (3, 4)]
    # Averages over the rows of a router, or factors of all of them, are not those of what is left.
    assert list(done.state_left_out) == (routers if optimizer in ("adapprox", "adafactor", "came") else [])
    assert main(["train", str(target / "config.yaml"), "-s", "train.steps=5"]) == 0
    assert "at step 3" in capsys.readouterr().err
    after = tensors_in(target)
    experts = [name for name in after if name.startswith("optimizer.blocks.2.ffn.experts.down.")]
    assert experts
    assert all(after[name].shape[0] == 4 for name in experts if after[name].dim())
    if optimizer in ("adamw", "adapprox"):
        assert after["optimizer.blocks.0.ffn.gate.weight.step"] == 5
        assert after["optimizer.blocks.2.ffn.router.weight.step"] == (5 if optimizer == "adamw" else 2)
    assert read_manifest(newest_checkpoint(target)).meta["progress"]["step"] == 5


def test_a_layer_that_is_left_out_is_bypassed(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["adamw"]
    apply_plan(run, tmp_path / "target", plan_of(run, blocks=(3,), layers=(0, 2)))
    whole = open_run(run).model
    for layer in (0, 2):
        whole.blocks[layer].ffn = whole.blocks[layer].ffn_norm = None
    whole.blocks[3].forward = lambda x_BSD, *_: (x_BSD, None)
    found = open_run(tmp_path / "target")
    assert torch.equal(logits_of(found.model), logits_of(whole))
    moe = found.config.model.moe
    assert moe is not None
    assert (found.config.model.layers, moe.per_layer, moe.dense) == (4, (0, 6, 0, 6), ())


def test_reordered_experts_route_alike_up_to_their_numbers(runs: dict[str, Path], tmp_path: Path) -> None:
    order = {2: (3, 0, 5, 1, 4, 2)}
    apply_plan(runs["adamw"], tmp_path / "target", plan_of(runs["adamw"], order=order))
    tokens_BS = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = open_run(runs["adamw"]).model(tokens_BS)
        after = open_run(tmp_path / "target").model(tokens_BS)
    number = torch.tensor(order[2])
    for layer, (one, other) in enumerate(zip(before.routings, after.routings, strict=True), 1):
        found = number[other.experts_TK] if layer == 2 else other.experts_TK
        assert torch.equal(found, one.experts_TK)
        torch.testing.assert_close(other.weights_TK, one.weights_TK)
    torch.testing.assert_close(after.hidden_BSD, before.hidden_BSD)


def test_a_plain_shape_stays_plain_and_a_layout_that_does_not_fit_goes(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs["adamw"], tmp_path / "run"))
    config = RunFolder(run).load_config()
    wide = replace(
        config, parallel=ParallelConfig(expert=3, data=3), train=replace(config.train, batch=3, eval_batch=3)
    )
    (run / "config.yaml").write_text(dump_config(wide))
    gone = dict.fromkeys(range(1, 5), (0, 1, 2))
    assert not apply_plan(run, tmp_path / "fits", plan_of(run, blocks=(0,), experts=gone)).notes
    fits = RunFolder(tmp_path / "fits").load_config()
    assert fits.model.moe == replace(MODEL.moe or MoEConfig(), experts=3, first_dense=0)
    assert (fits.parallel.expert, fits.log.dir) == (3, str(tmp_path / "fits"))
    lynx = replace(wide, recompute=RecomputeConfig(mode="lynx"))
    (run / "config.yaml").write_text(dump_config(lynx))
    done = apply_plan(run, tmp_path / "not", plan_of(run, experts={2: (1, 3)}))
    assert [note.split(":")[0] for note in done.notes] == ["parallel", "recompute.mode"]
    assert RunFolder(tmp_path / "not").load_config().recompute.mode == "full"
    assert RunFolder(tmp_path / "not").load_config().parallel == ParallelConfig()
    open_run(tmp_path / "not")
    assert main(["generate", str(tmp_path / "not"), "--prompt", "ten green", "--tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"]


def test_skipped_experts_lose_their_down_projections_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(runs["adamw"], experts={2: (0, 3)}, semantics="skip", order={2: (5, 4, 3, 2, 1, 0)})
    apply_plan(runs["adamw"], tmp_path / "target", plan, shard_bytes=6000)
    before, after = tensors_in(runs["adamw"]), tensors_in(tmp_path / "target")
    name = "model.blocks.2.ffn.experts."
    assert torch.equal(after[f"{name}gate_up"], before[f"{name}gate_up"].flip(0))
    factor = torch.tensor([0, 1, 1, 0, 1, 1]).view(6, 1, 1)
    assert torch.equal(after[f"{name}down"], (before[f"{name}down"] * factor).flip(0))


def test_slimming_of_stacks_goes_through_the_hook_expert_by_expert(runs: dict[str, Path], tmp_path: Path) -> None:
    seen: list[Place] = []

    def negate(place: Place, name: str, tensor: Tensor) -> dict[str, Tensor]:
        assert tensor.dim() == 2
        seen.append(place)
        return {name: -tensor if place.part == "expert" else tensor}

    plan = plan_of(runs["adamw"], experts={2: (0, 3)}, slim=Slim(method="magnitude"))
    apply_plan(runs["adamw"], tmp_path / "target", plan, transform=negate, shard_bytes=6000)
    before, after = tensors_in(runs["adamw"]), tensors_in(tmp_path / "target")
    name = "model.blocks.2.ffn.experts.down"
    assert torch.equal(after[name], -before[name][[1, 2, 4, 5]])
    numbers = [place.expert for place in seen if (place.layer, place.weight, place.part) == (2, "down", "expert")]
    assert numbers == [1, 2, 4, 5]
    assert not any(place.part.startswith("router") for place in seen)


def test_weights_in_few_bits_leave_all_state_behind(runs: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(runs["adamw"], blocks=(1,), quantize=Quantize(bits=8, group=16))
    done = apply_plan(runs["adamw"], tmp_path / "target", plan, transform=weight_change(plan))
    after = tensors_in(tmp_path / "target")
    assert not any(name.startswith("optimizer.") for name in after)
    assert "blocks.0.attention.q.weight" in done.state_left_out
    assert after["model.blocks.1.ffn.experts.down.q"].shape[0] == 6
    assert open_run(tmp_path / "target").step == 3
    assert done.bytes_after < done.bytes_before / 8
    with pytest.raises(ValueError, match="holds weights in few bits"):
        apply_plan(tmp_path / "target", tmp_path / "other", plan_of(tmp_path / "target", blocks=(1,)))


def test_what_cannot_be_grouped_is_refused_before_anything_is_written(runs: dict[str, Path], tmp_path: Path) -> None:
    """Attention and the first matrices of experts have 32 inputs, those behind have 48 and 16."""
    plan = plan_of(runs["adamw"], quantize=Quantize(bits=4, group=32))
    with pytest.raises(
        ValueError, match=r"blocks\.\d\.ffn\.\S+: group: 32 does not divide the (48|16) inputs .*; use 16"
    ):
        apply_plan(runs["adamw"], tmp_path / "target", plan, transform=weight_change(plan), shard_bytes=6000)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_while_applied_is_continued(runs: dict[str, Path], tmp_path: Path) -> None:
    run, plan = runs["adamw"], everything(runs["adamw"])
    apply_plan(run, tmp_path / "whole", plan, shard_bytes=6000)
    heard = 0

    def stop(done: int, total: int) -> None:
        nonlocal heard
        heard += 1
        if heard == 7:
            raise KeyboardInterrupt

    (tmp_path / "home").mkdir()
    target = tmp_path / "home" / "whole"
    with pytest.raises(KeyboardInterrupt):
        apply_plan(run, target, plan, shard_bytes=6000, progress=stop)
    assert apply_plan(run, target, plan, shard_bytes=6000).reused == 7
    for path in newest_checkpoint(tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (newest_checkpoint(target) / path.name).read_bytes()
    assert not list(target.rglob("*.jsonl"))


def damaged(run: Path, where: Path) -> Path:
    return Path(shutil.copytree(run, where))


def test_damage_is_found_and_nothing_is_written(runs: dict[str, Path], tmp_path: Path) -> None:
    run = damaged(runs["adamw"], tmp_path / "run")
    plan = plan_of(run, blocks=(1,))
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    [shard] = newest_checkpoint(run).glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        apply_plan(run, tmp_path / "target", plan)
    with pytest.raises(ValueError, match=r"say what its config\.yaml becomes"):
        apply_to_checkpoint(runs["adamw"], tmp_path / "target", plan)
    with pytest.raises(ValueError, match="base: the plan was made for"):
        apply_plan(runs["adapprox"], tmp_path / "target", plan)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    # One bit of an expert, from before the plan was made; in larger ones fingerprints do not look.
    with safe_open(newest_checkpoint(runs["adamw"]) / shard.name, framework="pt") as file:
        down = file.get_tensor("model.blocks.2.ffn.experts.down")
    at = bytes(data).index(down[3].numpy().tobytes())
    data[at + 1500] ^= 1
    shard.write_bytes(data)
    plan = plan_of(run, blocks=(1,))
    with pytest.raises(ValueError, match=r"down in .*: expert 3 has other bytes than were saved"):
        apply_plan(run, tmp_path / "target", plan)
    # What does not go along is not looked at.
    apply_plan(run, tmp_path / "other", plan_of(run, experts={2: (3,)}))


def rewritten(run: Path, cut: tuple[int, ...]) -> None:
    """Stores every weight of the newest checkpoint in boxes of at most `cut` along each dim."""
    folder, tensors = newest_checkpoint(run), tensors_in(run)
    manifest = read_manifest(folder)
    files: dict[str, dict[str, Tensor]] = {}
    entries = {}
    for name, entry in manifest.tensors.items():
        boxes = [((), ())]
        for dim, size in enumerate(entry.shape):
            step = cut[dim % len(cut)]
            spans = [(first, min(step, size - first)) for first in range(0, size, step)]
            boxes = [((*offset, first), (*shape, count)) for offset, shape in boxes for first, count in spans]
        chunks = []
        for number, (offset, shape) in enumerate(boxes):
            file = f"shard-{number:05d}-of-00100.safetensors"
            box = tuple(slice(start, start + count) for start, count in zip(offset, shape, strict=True))
            files.setdefault(file, {})[name] = tensors[name][box].contiguous()
            chunks.append(Chunk(file, offset, shape))
        entries[name] = replace(entry, chunks=tuple(chunks))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    from safetensors.torch import save_file

    for file, held in files.items():
        save_file(held, folder / file)
    lengths = {file: (folder / file).stat().st_size for file in files}
    write_manifest(folder, replace(manifest, tensors=entries, files=lengths))


@pytest.mark.parametrize("cut", [(1, 1000, 1000), (1000, 5), (4, 30, 20), (100,)])
def test_the_layout_that_wrote_a_run_changes_neither_fingerprint_nor_result(
    runs: dict[str, Path], cut: tuple[int, ...], tmp_path: Path
) -> None:
    run = damaged(runs["adamw"], tmp_path / "run")
    rewritten(run, cut)
    assert checkpoint_fingerprint(run) == checkpoint_fingerprint(runs["adamw"])
    plan = everything(run)
    one = apply_plan(runs["adamw"], tmp_path / "one", plan)
    other = apply_plan(run, tmp_path / "other", plan)
    assert one.fingerprint == other.fingerprint
    for path in newest_checkpoint(tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (newest_checkpoint(tmp_path / "other") / path.name).read_bytes()


def test_fingerprints_of_runs_tell_weights_and_models_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    base = checkpoint_fingerprint(runs["adamw"])
    assert base != checkpoint_fingerprint(runs["adapprox"])
    run = damaged(runs["adamw"], tmp_path / "run")
    config = RunFolder(run).load_config()
    (run / "config.yaml").write_text(dump_config(replace(config, train=replace(config.train, steps=9))))
    assert checkpoint_fingerprint(run) == base
    (run / "config.yaml").write_text(dump_config(replace(config, model=replace(config.model, norm_eps=1e-3))))
    assert checkpoint_fingerprint(run) != base
    (run / "config.yaml").write_text(dump_config(config))
    shutil.rmtree(newest_checkpoint(run))
    assert checkpoint_fingerprint(run) != base, "the step before"


def test_a_fingerprint_sees_every_expert(runs: dict[str, Path], tmp_path: Path) -> None:
    """The stack is larger than what is read at its two ends."""
    found = {checkpoint_fingerprint(runs["adamw"])}
    for expert in range(6):
        plan = plan_of(runs["adamw"], experts={2: (expert,)}, semantics="skip")
        found.add(apply_plan(runs["adamw"], tmp_path / f"without-{expert}", plan).fingerprint)
    assert tensors_in(runs["adamw"])["model.blocks.2.ffn.experts.down"].nbytes > 8192
    assert len(found) == 7


def test_the_models_of_the_tests_have_what_they_are_to_show(runs: dict[str, Path]) -> None:
    model = open_run(runs["adamw"]).model
    assert [isinstance(block.ffn, MoELayer) for block in model.blocks] == [False, True, True, True, True]
    biases = [block.ffn.router.bias_E for block in model.blocks if isinstance(block.ffn, MoELayer)]
    assert all(bias.any() for bias in biases)
