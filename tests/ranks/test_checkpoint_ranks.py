"""Checkpoints of many ranks: other layouts on load, failures that every rank learns of, kill -9."""

from __future__ import annotations

import itertools
import os
import random
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawned import RankError, run_ranks
from torch import Tensor, nn

from wastenot.parallel.checkpoint import Checkpointer, expert_dtensor, load, newest, read_meta
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.manifest import read_manifest
from wastenot.parallel.mesh import Mesh, make_mesh, single
from wastenot.parallel.training_state import load_training_state, training_state

EXPERTS = 8


def whole() -> dict[str, Tensor]:
    """The tensors as one process holds them; names with `expert` are sharded over the first dim."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "expert.w1": normal(EXPERTS, 5, 3),
        "expert.bf16": normal(EXPERTS, 4).bfloat16(),
        "expert.scalar_each": normal(EXPERTS).double(),
        "expert.no_width": normal(EXPERTS, 0),
        "expert.transposed": normal(EXPERTS, 6, 2).transpose(1, 2),
        "dense.a": normal(40, 10),
        "dense.b": normal(30, 10),
        "dense.scalar": torch.tensor(7),
        "dense.empty": torch.empty(0),
    }


def part(mesh: Mesh, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank of `mesh` holds of `tensors`, in the form that a checkpoint takes."""
    each = EXPERTS // mesh.expert.size
    first = mesh.expert.rank * each
    return {
        name: expert_dtensor(tensor[first : first + each], mesh) if name.startswith("expert") else tensor
        for name, tensor in tensors.items()
    }


def mesh_of(expert: int) -> Mesh:
    return make_mesh(ParallelConfig(expert=expert), "cpu")


def save_layouts(directory: Path, *layouts: int) -> None:
    """One checkpoint for each number of ranks that share the experts; its step is that number."""
    for expert in layouts:
        mesh = mesh_of(expert)
        tensors = {name: tensor.clone() for name, tensor in whole().items()}
        checkpointer = Checkpointer(directory, mesh, keep=9, asynchronous=expert != 2)
        checkpointer.save(expert, part(mesh, tensors), {"ranks": mesh.world.size})
        for tensor in tensors.values():
            tensor.zero_()
        assert checkpointer.latest() == directory / f"step-{expert:08d}"
        checkpointer.close()


def load_layouts(directories: list[Path], *layouts: int) -> None:
    """Loads every checkpoint there is into every layout."""
    paths = [path for directory in directories for path in sorted(directory.iterdir())]
    assert len(paths) == 6
    for path, expert in itertools.product(paths, layouts):
        mesh = mesh_of(expert)
        memory = {name: torch.full_like(tensor, 9) for name, tensor in whole().items()}
        target = part(mesh, memory)
        assert load(path, target, mesh) == {"ranks": read_manifest(path).layout["world"]}
        for name, expected in part(mesh, whole()).items():
            here, there = (getattr(tensor, "_local_tensor", tensor) for tensor in (target[name], expected))
            assert here.dtype == there.dtype
            assert here.equal(there), (path, name)
            # Loading went through the DTensor into the memory it was made of.
            assert here.numel() == 0 or not memory[name].eq(9).all(), name


def save_on_two(rank: int, world: int, directory: Path) -> None:
    save_layouts(directory / "2", 1, 2)


def save_on_four_and_load(rank: int, world: int, directory: Path) -> None:
    save_layouts(directory / "4", 1, 2, 4)
    load_layouts([directory / "1", directory / "2", directory / "4"], 1, 2, 4)


def test_every_layout_loads_what_every_other_wrote(tmp_path):
    save_layouts(tmp_path / "1", 1)
    run_ranks(2, save_on_two, tmp_path)
    run_ranks(4, save_on_four_and_load, tmp_path)
    load_layouts([tmp_path / "1", tmp_path / "2", tmp_path / "4"], 1)


def test_replicated_tensors_are_written_once_and_in_equal_parts(tmp_path):
    run_ranks(4, save_balanced, tmp_path)
    manifest = read_manifest(tmp_path / "step-00000001")
    assert manifest.layout == {"world": 4, "pipeline": 1, "data": 4, "shard": 1, "tensor": 1, "expert": 2}
    assert len(manifest.tensors["e"].chunks) == 2
    assert all(len(manifest.tensors[f"w{index}"].chunks) == 1 for index in range(8))
    state_bytes = (8 * 1000 + 8 * 100) * 4
    lengths = list(manifest.files.values())
    assert sum(lengths) - state_bytes < 4 * 1000, "headers only"
    assert max(lengths) < 1.25 * state_bytes / 4 + 1000


def save_balanced(rank: int, world: int, directory: Path) -> None:
    mesh = mesh_of(2)
    dense = {f"w{index}": torch.ones(1000) for index in range(8)}
    checkpointer = Checkpointer(directory, mesh, asynchronous=False)
    checkpointer.save(1, {**dense, "e": expert_dtensor(torch.ones(4, 100), mesh)}, {})


def test_a_rank_without_anything_to_write_is_no_damage(tmp_path):
    run_ranks(3, save_scalar, tmp_path)
    assert len(read_manifest(tmp_path / "step-00000001").files) == 1


def save_scalar(rank: int, world: int, directory: Path) -> None:
    checkpointer = Checkpointer(directory, mesh_of(1))
    checkpointer.save(1, {"only": torch.tensor(5)}, {})
    target = {"only": torch.tensor(0)}
    load(checkpointer.latest(), target, mesh_of(1))
    assert target["only"].item() == 5


def test_training_collectives_never_meet_those_of_the_writer(tmp_path):
    run_ranks(4, reduce_while_saving, tmp_path)


def reduce_while_saving(rank: int, world: int, directory: Path) -> None:
    mesh = mesh_of(2)
    checkpointer = Checkpointer(directory, mesh)
    for step in range(1, 6):
        checkpointer.save(step, {"x": torch.full((300_000,), step), "e": expert_dtensor(torch.ones(2, 9), mesh)}, {})
        for index in range(40):
            # Ranks arrive at different times, the writer's collectives in between.
            total = torch.full((1 + 97 * index,), rank + index)
            dist.all_reduce(total)
            assert total.eq(6 + 4 * index).all()
            dist.barrier(mesh.expert.group)
    path = checkpointer.latest()
    target = {"x": torch.zeros(300_000, dtype=torch.int64), "e": expert_dtensor(torch.zeros(2, 9), mesh)}
    load(path, target, mesh)
    assert target["x"].eq(5).all()


# One rank's trouble is everyone's


def raised(kind: type[Exception], action) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def disagree(rank: int, world: int, directory: Path) -> list[str]:
    mesh = mesh_of(1)
    checkpointer = Checkpointer(directory, mesh)
    odd = rank == 1
    messages = [
        raised(ValueError, lambda: checkpointer.save(1, {"x": torch.zeros(3 if odd else 2)}, {})),
        raised(ValueError, lambda: checkpointer.save(1, {"x": torch.zeros(2).to(torch.int if odd else None)}, {})),
        raised(
            ValueError, lambda: checkpointer.save(1, {"x": torch.zeros(2), **({"y": torch.ones(1)} if odd else {})}, {})
        ),
        raised(ValueError, lambda: checkpointer.save(1, {"x": 3 if odd else torch.zeros(1)}, {})),
    ]
    assert list(directory.iterdir()) == []
    checkpointer.save(1, {"x": torch.zeros(2)}, {})
    path = checkpointer.latest()
    target = torch.ones(2)
    messages.append(raised(ValueError, lambda: load(path, {"z" if odd else "x": target}, mesh)))
    assert target.eq(1).all(), "no rank loads what another cannot"
    return messages


def test_disagreement_is_refused_on_every_rank(tmp_path):
    first, *others = run_ranks(3, disagree, tmp_path)
    assert others == [first, first]
    shape, dtype, name, value, misfit = first
    assert shape == "x differs between ranks: (torch.float32, [2]) on rank 0, (torch.float32, [3]) on rank 1"
    assert "torch.int32" in dtype
    assert name == "y differs between ranks: missing on rank 0, (torch.float32, [1]) on rank 1"
    assert value == "rank 1: x is a int; a checkpoint holds tensors, put the rest into meta"
    assert misfit.startswith("rank 1: ")
    assert "1 not in the checkpoint: z; 1 only in the checkpoint: x" in misfit


def fill_the_disk(rank: int, world: int, directory: Path) -> list[str]:
    mesh = mesh_of(4)
    checkpointer = Checkpointer(directory, mesh)
    tensors = {"e": expert_dtensor(torch.ones(1, 500_000), mesh)}
    checkpointer.save(1, tensors, {})
    checkpointer.wait()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, unlimited[1]))
    checkpointer.save(2, tensors, {})
    messages = [raised(OSError, checkpointer.wait)]
    assert checkpointer.latest() == directory / "step-00000001"
    assert [path.name for path in directory.iterdir()] == ["step-00000001"]
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    checkpointer.save(3, tensors, {})
    assert checkpointer.latest() == directory / "step-00000003"
    checkpointer.close()
    return messages


def test_a_rank_whose_disk_is_full_fails_the_checkpoint_everywhere_and_the_one_before_stays(tmp_path):
    first, *others = run_ranks(4, fill_the_disk, tmp_path)
    assert others == [first] * 3
    [message] = first
    assert "checkpoint of step 2 was not written to" in message
    assert "rank 2: shard-00002-of-00004.safetensors" in message
    assert "File too large" in message


def save_apart(rank: int, world: int, directory: Path) -> str:
    own = directory / str(rank)
    checkpointer = Checkpointer(own, mesh_of(2))
    checkpointer.save(1, {"e": expert_dtensor(torch.ones(1, 3), mesh_of(2))}, {})
    message = raised(OSError, checkpointer.close)
    assert not own.exists() or list(own.iterdir()) == []
    return message


def test_ranks_that_do_not_share_the_directory_are_told(tmp_path):
    for message in run_ranks(2, save_apart, tmp_path):
        assert f"rank 1: {tmp_path / '1'}" in message
        assert "does not exist here: all ranks must share the directory" in message


def refuse_damaged(rank: int, world: int, directory: Path) -> str:
    mesh = mesh_of(2)
    save_layouts(directory, 1, 2)
    checkpointer = Checkpointer(directory, mesh)
    if rank == 1:
        (directory / "step-00000002" / "shard-00001-of-00002.safetensors").unlink()
    dist.barrier()
    message = raised(ValueError, lambda: load(directory / "step-00000002", part(mesh, whole()), mesh))
    assert checkpointer.latest() == directory / "step-00000001"
    return message


def test_damage_is_refused_on_every_rank(tmp_path):
    first, second = run_ranks(2, refuse_damaged, tmp_path)
    assert first == second
    assert "shard-00001-of-00002.safetensors is missing" in first


# Training goes on at another layout


class TinyExperts(nn.Module):
    """A dense matrix and this rank's experts, with gradients that need no communication."""

    def __init__(self, mesh: Mesh, rows: int = 2) -> None:
        super().__init__()
        each = EXPERTS // mesh.expert.size
        self.first = mesh.expert.rank * each
        self.dense = nn.Parameter(torch.ones(3, 2))
        self.experts = nn.Parameter(torch.ones(each, rows, 2))

    def fill_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        self.dense.grad = torch.randn(3, 2, generator=generator)
        whole = torch.randn(EXPERTS, *self.experts.shape[1:], generator=generator)
        self.experts.grad = whole[self.first : self.first + len(self.experts)].clone()


def is_expert(name: str) -> bool:
    return name == "experts"


def train_ranks(rank: int, world: int, directory: Path, expert: int, first: int, last: int) -> None:
    train(mesh_of(expert), directory, first, last)


def train(mesh: Mesh, directory: Path, first: int, last: int) -> None:
    model = TinyExperts(mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpointer = Checkpointer(directory, mesh)
    if first:
        meta = load_training_state(checkpointer.latest(), model, optimizer, mesh, is_expert)
        assert meta == {"step": first}
        assert optimizer.state[model.experts]["exp_avg"].shape == model.experts.shape
        assert optimizer.state[model.experts]["step"].item() == first
    for step in range(first, last):
        model.fill_gradients(step)
        optimizer.step()
    checkpointer.save(last, training_state(model, optimizer, mesh, is_expert), {"step": last})
    checkpointer.close()


def test_training_resumed_at_other_layouts_ends_with_the_same_bits(tmp_path):
    train(single(), tmp_path / "straight", 0, 6)
    run_ranks(4, train_ranks, tmp_path / "moved", 4, 0, 2)
    train(single(), tmp_path / "moved", 2, 4)
    run_ranks(4, train_ranks, tmp_path / "moved", 2, 4, 6)
    ends = []
    for run in ("straight", "moved"):
        path = newest(tmp_path / run)
        assert path is not None
        entries = read_manifest(path).tensors
        tensors = {name: torch.zeros(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
        load(path, tensors, single())
        ends.append(tensors)
    straight, moved = ends
    assert straight.keys() == moved.keys()
    assert "optimizer.experts.exp_avg_sq" in straight
    for name, tensor in straight.items():
        assert tensor.equal(moved[name]), name


def train_quantized_ranks(rank: int, world: int, directory: Path, first: int, last: int) -> None:
    train_quantized(mesh_of(world), directory, first, last)


def train_quantized(mesh: Mesh, directory: Path, first: int, last: int) -> Tensor:
    """Moments of the experts in eight bits, two blocks an expert; returns the experts of this rank."""
    from wastenot.launch.adamw8bit import AdamW8bit

    model = TinyExperts(mesh, rows=256)
    optimizer = AdamW8bit(model.parameters(), lr=0.1)
    checkpointer = Checkpointer(directory, mesh)
    if first:
        load_training_state(checkpointer.latest(), model, optimizer, mesh, is_expert)
    for step in range(first, last):
        model.fill_gradients(step)
        optimizer.step()
    moment = optimizer.state[model.experts]["exp_avg"]
    assert moment.codes.shape == (EXPERTS // mesh.expert.size, 256, 2)
    assert moment.scale.shape == (2 * len(model.experts),)
    checkpointer.save(last, training_state(model, optimizer, mesh, is_expert), {})
    checkpointer.close()
    return model.experts.detach()


def test_quantized_moments_move_between_layouts_block_by_block(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'wastenot[optimizers]'")
    straight = train_quantized(single(), tmp_path / "straight", 0, 6)
    train_quantized(single(), tmp_path / "moved", 0, 2)
    run_ranks(2, train_quantized_ranks, tmp_path / "moved", 2, 4)
    moved = train_quantized(single(), tmp_path / "moved", 4, 6)
    assert moved.equal(straight)


# Kill -9


def save_until_killed(rank: int, world: int, directory: Path, first: int, victim: int, delay: float) -> None:
    checkpointer = Checkpointer(directory, mesh_of(1))
    for step in range(first, first + 10_000):
        # Each rank writes one of the two.
        checkpointer.save(step, {name: torch.full((300_000,), step) for name in "ab"}, {"step": step})
        if step == first and rank == victim:
            os.posix_spawn("/bin/sh", ["sh", "-c", f"sleep {delay}; kill -9 {os.getpid()}"], os.environ)
        if step % 2:
            checkpointer.wait()
            if rank == 0:
                (directory.parent / "waited").write_text(str(step))


def test_killed_at_any_moment_the_newest_is_whole_and_not_older_than_the_last_wait(tmp_path):
    moments = random.Random(5)
    directory, waited = tmp_path / "checkpoints", tmp_path / "waited"
    step, unfinished = 0, 0
    for trial in range(20):
        world = 1 + trial % 2
        victim = trial // 2 % world
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(world, save_until_killed, directory, step + 1, victim, moments.uniform(0.0, 0.3))
        unfinished += any(path.name.startswith(".") for path in directory.iterdir())
        found = newest(directory)
        # The note may have been cut off by the kill as well.
        last_wait = int((waited.read_text() if waited.exists() else "") or 0)
        if found is None:
            assert last_wait == 0
            continue
        step = read_meta(found)["step"]
        assert step >= last_wait
        target = {name: torch.zeros(300_000, dtype=torch.int64) for name in "ab"}
        assert load(found, target, single()) == {"step": step}
        assert all(tensor.eq(step).all() for tensor in target.values())
    assert unfinished >= 3, "the kills hit writes"
    assert step >= 5, "and saves succeeded between them"
