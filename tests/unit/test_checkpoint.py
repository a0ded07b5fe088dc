"""Checkpoints of one process: bits, atomicity, damage, strictness, no code in files, a full disk."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wastenot.parallel.checkpoint import Checkpointer, load, newest, read_meta
from wastenot.parallel.manifest import Chunk, TensorEntry, check_coverage
from wastenot.parallel.mesh import Axis, single
from wastenot.parallel.training_state import load_training_state, training_state

MESH = single()
SHARD = "shard-00000-of-00001.safetensors"


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return {
        "fp32": normal(7, 5).float(),
        "fp64": normal(3, 2, 2),
        "bf16": normal(33).bfloat16(),
        "fp16": normal(4, 4).half(),
        "odd": odd,
        "payload": torch.tensor([0x7FC01234, -1], dtype=torch.int32).view(torch.float32),
        "int64": torch.tensor([2**62 + 1, -1]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "scalar_int": torch.tensor(-5),
        "empty": torch.empty(0),
        "empty_2d": torch.empty(4, 0, dtype=torch.bfloat16),
        "transposed": normal(6, 4).t(),
        "strided": normal(20)[::3],
        "expanded": normal(3, 1).expand(3, 4),
    }


def like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 1, memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def save_steps(directory: Path, *steps: int, keep: int = 2) -> Checkpointer:
    """A checkpointer that has saved {"x": step} for each step."""
    checkpointer = Checkpointer(directory, MESH, keep=keep)
    for step in steps:
        checkpointer.save(step, {"x": torch.full((1000,), step)}, {"step": step})
    checkpointer.wait()
    return checkpointer


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_loaded_has_the_bits_that_were_saved(tmp_path, asynchronous):
    tensors = some_tensors()
    meta = {"tokens": 2**60, "loss": 0.1, "nested": {"list": [1, None, "ü", True]}}
    checkpointer = Checkpointer(tmp_path, MESH, asynchronous=asynchronous)
    checkpointer.save(12, tensors, meta)
    path = checkpointer.latest()
    assert path == tmp_path / "step-00000012"
    loaded = like(tensors)
    assert load(path, loaded, MESH) == meta == read_meta(path)
    for name, tensor in tensors.items():
        assert bits(loaded[name]) == bits(tensor), name
    checkpointer.close()


def test_tensors_and_meta_may_change_as_soon_as_save_returns(tmp_path):
    checkpointer = Checkpointer(tmp_path, MESH)
    x, meta = torch.arange(1_000_000), {"seen": [1]}
    checkpointer.save(1, {"x": x, "same_memory": x[:10]}, meta)
    x.zero_()
    meta["seen"].append(2)
    checkpointer.wait()
    loaded = {"x": torch.zeros_like(x), "same_memory": torch.zeros(10, dtype=torch.int64)}
    assert load(tmp_path / "step-00000001", loaded, MESH) == {"seen": [1]}
    assert loaded["x"].equal(torch.arange(1_000_000))
    assert loaded["same_memory"].equal(torch.arange(10))


def test_the_newest_ones_stay_and_others_leave_no_trace(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, keep=3)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]


def test_the_newest_is_the_one_saved_last_even_after_going_back(tmp_path):
    checkpointer = save_steps(tmp_path, 100, 200)
    checkpointer.save(150, {"x": torch.full((1000,), 150)}, {})
    assert checkpointer.latest() == tmp_path / "step-00000150"
    assert names(tmp_path) == ["step-00000150", "step-00000200"]


def test_a_step_saved_again_never_replaces_the_first_before_it_is_complete(tmp_path):
    checkpointer = save_steps(tmp_path, 7, 7)
    assert names(tmp_path) == ["step-00000007", "step-00000007-2"]
    assert checkpointer.latest() == tmp_path / "step-00000007-2"
    checkpointer.save(7, {"x": torch.zeros(1)}, {})
    assert checkpointer.latest() == tmp_path / "step-00000007-3"
    assert names(tmp_path) == ["step-00000007-2", "step-00000007-3"]


def test_what_a_killed_run_left_is_never_picked_up_and_goes_at_the_next_start(tmp_path):
    save_steps(tmp_path, 1).close()
    (tmp_path / "step-00000001").rename(tmp_path / ".partial-step-00000002-abcd")
    (tmp_path / ".trash-step-00000001-abcd").mkdir()
    (tmp_path / "notes").mkdir()
    assert newest(tmp_path) is None
    assert Checkpointer(tmp_path, MESH).latest() is None
    assert names(tmp_path) == ["notes"]


def test_no_directory_has_no_newest(tmp_path):
    assert newest(tmp_path / "absent") is None


# Damage


def truncate(path: Path) -> None:
    os.truncate(path / SHARD, 100)


def remove(path: Path) -> None:
    (path / SHARD).unlink()


def scramble(path: Path) -> None:
    (path / SHARD).write_bytes(b"\xff" * (path / SHARD).stat().st_size)


def unreadable_manifest(path: Path) -> None:
    (path / "meta.json").write_bytes(b"\x80\x04junk")


def half_manifest(path: Path) -> None:
    os.truncate(path / "meta.json", 60)


def no_manifest(path: Path) -> None:
    (path / "meta.json").unlink()


def edit(path: Path, change) -> None:
    raw = json.loads((path / "meta.json").read_text())
    change(raw)
    (path / "meta.json").write_text(json.dumps(raw))


def no_tensors(path: Path) -> None:
    edit(path, lambda raw: raw.pop("tensors"))


def escaping_file(path: Path) -> None:
    edit(path, lambda raw: raw["files"].update({"../../elsewhere.safetensors": 1}))


def not_a_dtype(path: Path) -> None:
    edit(path, lambda raw: raw["tensors"]["x"].update(dtype="load"))


def other_version(path: Path) -> None:
    edit(path, lambda raw: raw.update(version=99))


def hole(path: Path) -> None:
    edit(path, lambda raw: raw["tensors"]["x"]["chunks"][0].update(shape=[999]))


def doubled(path: Path) -> None:
    edit(path, lambda raw: raw["tensors"]["x"]["chunks"].append(raw["tensors"]["x"]["chunks"][0]))


def outside(path: Path) -> None:
    edit(path, lambda raw: raw["tensors"]["x"]["chunks"][0].update(offset=[1]))


def nobody(path: Path) -> None:
    edit(path, lambda raw: raw["tensors"]["x"].update(chunks=[]))


def unlisted(path: Path) -> None:
    edit(path, lambda raw: raw.update(files={}))


def absent_tensor(path: Path) -> None:
    edit(path, lambda raw: raw["tensors"].update(y=raw["tensors"]["x"]))


DAMAGE = [
    (truncate, f"{SHARD} has 100 bytes instead of"),
    (remove, f"{SHARD} is missing \\(1 tensors, among them x\\)"),
    (scramble, f"{SHARD} is unreadable"),
    (unreadable_manifest, "meta.json is unreadable"),
    (half_manifest, "meta.json is not a manifest"),
    (no_manifest, "not a complete checkpoint: meta.json is missing"),
    (no_tensors, "not a manifest: KeyError: 'tensors'"),
    (escaping_file, "'../../elsewhere.safetensors' is not the name of a shard"),
    (not_a_dtype, "'load' is not a dtype"),
    (other_version, "wastenot-checkpoint 99; this version of wastenot reads wastenot-checkpoint 1"),
    (hole, r"x \[1000\]: the chunks hold 999 of 1000 elements"),
    (doubled, r"x \[1000\]: chunk \[0:1000\] in \S+ and chunk \[0:1000\] in \S+ overlap"),
    (outside, r"x \[1000\]: chunk \[1:1001\] in \S+ lies outside"),
    (nobody, "hold 0 of 1000 elements"),
    (unlisted, f"no length for {SHARD}, which holds x"),
    (absent_tensor, f"{SHARD} lacks y"),
]


@pytest.mark.parametrize(("harm", "message"), DAMAGE, ids=[harm.__name__ for harm, _ in DAMAGE])
def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(tmp_path, caplog, harm, message):
    checkpointer = save_steps(tmp_path, 1, 2)
    damaged = tmp_path / "step-00000002"
    harm(damaged)
    loaded = {"x": torch.zeros(1000, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message) as refusal:
        load(damaged, loaded, MESH)
    assert str(damaged) in str(refusal.value)
    assert not loaded["x"].any(), "nothing is changed by a refused load"
    with caplog.at_level(logging.WARNING):
        assert checkpointer.latest() == tmp_path / "step-00000001"
    assert str(damaged) in caplog.text
    # The damaged one neither counts among those kept nor stops the next save.
    checkpointer.save(3, {"x": torch.zeros(1000)}, {})
    assert checkpointer.latest() == tmp_path / "step-00000003"
    assert "step-00000001" in names(tmp_path)


def test_a_shard_that_is_not_what_the_manifest_says_is_refused(tmp_path):
    save_steps(tmp_path, 1)
    path = tmp_path / "step-00000001"
    edit(path, lambda raw: raw["tensors"]["x"].update(dtype="int32"))
    with pytest.raises(ValueError, match=f"x in {SHARD} is not what the manifest says"):
        load(path, {"x": torch.zeros(1000, dtype=torch.int32)}, MESH)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Chunk]]:
    """A box and non-empty boxes that tile it, made by cutting."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        start, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(1, size[dim] - 1)) if size[dim] > 1 else 0
        for first, length in ((0, cut), (cut, size[dim] - cut)):
            if length:
                corner = (*start[:dim], start[dim] + first, *start[dim + 1 :])
                boxes.append((corner, (*size[:dim], length, *size[dim + 1 :])))
    return shape, [Chunk("f", start, size) for start, size in draw(st.permutations(boxes))]


@given(partitions(), st.data())
def test_chunks_cover_if_and_only_if_none_is_missing_or_doubled(partition, data):
    shape, chunks = partition
    check_coverage("t", TensorEntry(torch.float32, shape, tuple(chunks)))
    which = data.draw(st.integers(0, len(chunks) - 1))
    with pytest.raises(ValueError, match=r"^t "):
        check_coverage("t", TensorEntry(torch.float32, shape, tuple(chunks[:which] + chunks[which + 1 :])))
    with pytest.raises(ValueError, match=r"^t "):
        check_coverage("t", TensorEntry(torch.float32, shape, (*chunks, chunks[which])))
    other = data.draw(st.integers(0, len(chunks) - 1))
    if chunks[other].shape == chunks[which].shape and other != which:
        # Volumes add up, yet one place is empty and another is held twice.
        chunks[other] = chunks[which]
        with pytest.raises(ValueError, match="overlap"):
            check_coverage("t", TensorEntry(torch.float32, shape, tuple(chunks)))


# Strictness


def test_every_misfit_is_listed(tmp_path):
    checkpointer = Checkpointer(tmp_path, MESH)
    many = {f"gone{index:02d}": torch.zeros(1) for index in range(12)}
    checkpointer.save(1, {"w": torch.zeros(4, 2), "b": torch.zeros(2), **many}, {})
    here = {"w": torch.zeros(2, 4), "b": torch.zeros(2, dtype=torch.float64), "new": torch.zeros(1)}
    with pytest.raises(ValueError) as refusal:
        load(checkpointer.latest(), here, MESH)
    message = str(refusal.value)
    assert "1 not in the checkpoint: new" in message
    assert "12 only in the checkpoint: gone00, " in message
    assert "gone09 and 2 more" in message
    assert "1 of another shape: w [4, 2], here [2, 4]" in message
    assert "1 of another dtype: b torch.float32, here torch.float64" in message
    assert message.endswith("Use the model and optimizer settings that it was saved with")


def test_a_prefix_loads_a_part(tmp_path):
    checkpointer = Checkpointer(tmp_path, MESH)
    checkpointer.save(1, {"model.w": torch.ones(2), "optimizer.w.step": torch.tensor(3.0)}, {"a": 1})
    loaded = {"model.w": torch.zeros(2)}
    assert load(checkpointer.latest(), loaded, MESH, prefix="model.") == {"a": 1}
    assert loaded["model.w"].equal(torch.ones(2))
    with pytest.raises(ValueError, match=r"only in the checkpoint: model\.w"):
        load(checkpointer.latest(), {}, MESH, prefix="model.")


def test_a_directory_of_checkpoints_is_not_one_but_names_one(tmp_path):
    save_steps(tmp_path, 1, 2)
    with pytest.raises(ValueError, match=r"is a directory of checkpoints; .*step-00000002"):
        load(tmp_path, {}, MESH)
    with pytest.raises(ValueError, match=r"absent is not a complete checkpoint: meta\.json is missing"):
        load(tmp_path / "absent", {}, MESH)


@pytest.mark.parametrize(
    ("tensors", "meta", "message"),
    [
        ({"x": 3}, {}, "x is a int; a checkpoint holds tensors"),
        ({"x": torch.zeros(2, device="meta")}, {}, "x is not a dense tensor with values"),
        ({"x": torch.eye(2).to_sparse()}, {}, "x is not a dense tensor"),
        ({}, {"x": torch.zeros(1)}, "must be JSON: Object of type Tensor"),
        ({}, {"x": (1, 2)}, "use lists for tuples"),
        ({}, {3: 1}, "strings as keys"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, tensors, meta, message):
    checkpointer = Checkpointer(tmp_path, MESH)
    with pytest.raises(ValueError, match=message):
        checkpointer.save(1, tensors, meta)
    assert names(tmp_path) == []


def test_a_step_below_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step: -1 is negative"):
        Checkpointer(tmp_path, MESH).save(-1, {}, {})


def test_keeping_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep: 0 would leave no checkpoint"):
        Checkpointer(tmp_path, MESH, keep=0)


# No code in files


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_no_pickle_is_ever_executed(tmp_path):
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists(), "the bomb works"
    mark.unlink()

    directory = tmp_path / "checkpoints"
    checkpointer = save_steps(directory, 1, 2)
    path = directory / "step-00000002"
    # A stray metadata file of torch.distributed.checkpoint's own format is not even opened.
    (path / ".metadata").write_bytes(bomb)
    load(path, {"x": torch.zeros(1000, dtype=torch.int64)}, MESH)
    (path / SHARD).write_bytes(bomb)
    with pytest.raises(ValueError, match="is damaged"):
        load(path, {"x": torch.zeros(1000, dtype=torch.int64)}, MESH)
    edit(path, lambda raw: raw["files"].update({SHARD: len(bomb)}))
    with pytest.raises(ValueError, match=f"{SHARD} is unreadable"):
        load(path, {"x": torch.zeros(1000, dtype=torch.int64)}, MESH)
    (path / "meta.json").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"meta\.json is"):
        load(path, {"x": torch.zeros(1000, dtype=torch.int64)}, MESH)
    assert checkpointer.latest() == directory / "step-00000001"
    assert not mark.exists()


# A full disk


@contextmanager
def file_size_limit(num_bytes: int):
    """The system refuses longer files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_is_raised_once_and_leaves_the_one_before(tmp_path, asynchronous):
    checkpointer = Checkpointer(tmp_path, MESH, asynchronous=asynchronous)
    big = {"x": torch.ones(1_000_000)}
    checkpointer.save(1, big, {})
    checkpointer.wait()
    with file_size_limit(1_000_000):
        with pytest.raises(OSError, match=r"step 2 was not written to .*: shard-\S+ .*File too large") as failure:
            checkpointer.save(2, big, {})
            checkpointer.wait()
        assert str(tmp_path) in str(failure.value)
        assert checkpointer.latest() == tmp_path / "step-00000001"
        assert names(tmp_path) == ["step-00000001"]
        if asynchronous:
            checkpointer.save(3, big, {})
            with pytest.raises(OSError, match="step 3 was not written"):
                checkpointer.save(4, big, {})
    load(tmp_path / "step-00000001", {"x": torch.zeros(1_000_000)}, MESH)
    checkpointer.save(5, big, {})
    assert checkpointer.latest() == tmp_path / "step-00000005"
    checkpointer.close()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Checkpointer(tmp_path / "file" / "checkpoints", MESH)


# Model and optimizer


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.mid = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("bias", torch.zeros(11))
        self.register_buffer("cache", torch.zeros(5), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.mid(self.embed(tokens)))) + self.bias


def no_experts(name: str) -> bool:
    return False


def train(model: Small, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[bytes]:
    losses = []
    for step in range(first, last):
        tokens = torch.randint(11, (8,), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.bias += 0.01
        losses.append(bits(loss))
    return losses


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.05, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.05),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_continues_bit_for_bit(tmp_path, kind):
    model = Small()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 0, 3)
    checkpointer = Checkpointer(tmp_path, MESH)
    checkpointer.save(3, training_state(model, optimizer, MESH, no_experts), {"step": 3})
    expected = train(model, optimizer, 3, 6)

    for stepped_before in (False, True):
        torch.manual_seed(1)
        again = Small()
        # Other order of parameters: state goes by name.
        optimizer_again = OPTIMIZERS[kind](list(again.parameters())[::-1])
        if stepped_before:
            train(again, optimizer_again, 10, 12)
        meta = load_training_state(checkpointer.latest(), again, optimizer_again, MESH, no_experts)
        assert meta == {"step": 3}
        assert train(again, optimizer_again, 3, 6) == expected
        final = training_state(model, optimizer, MESH, no_experts)
        resumed = training_state(again, optimizer_again, MESH, no_experts)
        assert {name: bits(tensor) for name, tensor in final.items()} == {
            name: bits(tensor) for name, tensor in resumed.items()
        }


def test_names_are_those_of_parameters_persistent_buffers_and_state():
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    weights = {"model.embed.weight", "model.mid.weight", "model.mid.bias", "model.unused", "model.bias"}
    assert set(training_state(model, optimizer, MESH, no_experts)) == weights
    train(model, optimizer, 0, 1)
    moments = {
        f"optimizer.{name}.{key}"
        for name in ("embed.weight", "mid.weight", "mid.bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert set(training_state(model, optimizer, MESH, no_experts)) == weights | moments
    assert set(training_state(model, None, MESH, no_experts)) == weights


def test_the_model_alone_loads_without_the_optimizer(tmp_path):
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 0, 1)
    checkpointer = Checkpointer(tmp_path, MESH)
    checkpointer.save(1, training_state(model, optimizer, MESH, no_experts), {})
    again = Small()
    load_training_state(checkpointer.latest(), again, None, MESH, no_experts)
    assert again.mid.weight.equal(model.mid.weight)


def test_a_refused_load_leaves_model_and_optimizer(tmp_path):
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 0, 1)
    checkpointer = Checkpointer(tmp_path, MESH)
    checkpointer.save(1, {"model.other": torch.zeros(1)}, {})
    before = {name: bits(tensor) for name, tensor in training_state(model, optimizer, MESH, no_experts).items()}
    for path in (checkpointer.latest(), tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"does not fit|meta\.json is missing"):
            load_training_state(path, model, optimizer, MESH, no_experts)
        after = training_state(model, optimizer, MESH, no_experts)
        assert {name: bits(tensor) for name, tensor in after.items()} == before


def test_state_that_is_neither_tensors_nor_numbers_is_refused():
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.mid.bias]["seen"] = {3}
    with pytest.raises(ValueError, match=r"state 'seen' of mid\.bias is a set"):
        training_state(model, optimizer, MESH, no_experts)


def test_numbers_come_back_as_the_numbers_they_were(tmp_path):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    numbers = {"count": 2**60 + 1, "ratio": 0.1, "done": True}
    optimizer.state[model.mid.bias].update(numbers)
    checkpointer = Checkpointer(tmp_path, MESH)
    checkpointer.save(1, training_state(model, optimizer, MESH, no_experts), {})
    again = Small()
    optimizer_again = torch.optim.SGD(again.parameters(), lr=0.1)
    load_training_state(checkpointer.latest(), again, optimizer_again, MESH, no_experts)
    [(parameter, state)] = optimizer_again.state.items()
    assert parameter is again.mid.bias
    assert state == numbers
    assert [type(value) for value in state.values()] == [int, float, bool]


class Pairs(torch.optim.SGD):
    """Keeps a pair of tensors, and a function of them that need not be saved."""

    def unwrap(self, parameter: Tensor, key: str, value: Any) -> dict[str, Tensor]:
        assert parameter.shape == (6,)
        return dict(zip("ab", value, strict=True)) if key == "pair" else {}

    def wrap(self, parameter: Tensor, key: str, parts: Mapping[str, Tensor]) -> Any:
        assert (parameter.shape, key) == ((6,), "pair")
        return parts["a"], parts["b"]


def test_what_an_optimizer_unwraps_it_wraps_again(tmp_path):
    model = Small()
    optimizer = Pairs(model.parameters(), lr=0.1)
    optimizer.state[model.mid.bias].update(pair=(torch.arange(3), torch.ones(2)), followed=str)
    checkpointer = Checkpointer(tmp_path, MESH)
    state = training_state(model, optimizer, MESH, no_experts)
    assert {name for name in state if "optimizer" in name} == {f"optimizer.mid.bias.pair#{part}" for part in "ab"}
    checkpointer.save(1, state, {})
    again = Small()
    optimizer_again = Pairs(again.parameters(), lr=0.1)
    load_training_state(checkpointer.latest(), again, optimizer_again, MESH, no_experts)
    [(key, (a, b))] = optimizer_again.state[again.mid.bias].items()
    assert (key, a.tolist(), b.tolist()) == ("pair", [0, 1, 2], [1.0, 1.0])
    other = torch.optim.SGD(again.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"has optimizer\.mid\.bias\.pair#a, which SGD does not know"):
        load_training_state(checkpointer.latest(), again, other, MESH, no_experts)
    assert not other.state


def test_one_tensor_for_experts_that_ranks_share_is_refused():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.mid.weight]["scale"] = torch.zeros(7)
    shared = replace(MESH, expert=Axis("expert", size=2))
    with pytest.raises(ValueError, match=r"'scale' of mid\.weight is \[7\] for 6 experts.*use parallel\.expert: 1"):
        training_state(model, optimizer, shared, lambda name: name == "mid.weight")
    assert "optimizer.mid.weight.scale" in training_state(model, optimizer, MESH, lambda name: name == "mid.weight")
