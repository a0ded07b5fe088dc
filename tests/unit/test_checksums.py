"""A checkpoint proves that what it holds is what was saved, expert by expert."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wastenot.parallel.checkpoint import Checkpointer, load, verify
from wastenot.parallel.checksums import sums_of
from wastenot.parallel.mesh import single
from wastenot.tools.cli import main

MESH = single()
SHARD = "shard-00000-of-00001.safetensors"
EXPERTS = "model.blocks.0.ffn.experts.down"


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        EXPERTS: torch.randn(4, 3, 5, generator=draw),
        "model.norm": torch.randn(7, generator=draw).bfloat16(),
        "optimizer.norm.step": torch.tensor(3.0),
        "optimizer.norm.exp_avg": torch.tensor([math.nan, 1.0]),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpointer = Checkpointer(tmp_path / "checkpoints", MESH)
    checkpointer.save(7, tensors(), {})
    path = checkpointer.latest()
    checkpointer.close()
    assert path is not None
    return path


def flip(path: Path, value: Tensor) -> None:
    """Changes one bit of the only place in the file that holds the bytes of `value`."""
    content = bytearray((path / SHARD).read_bytes())
    there = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert content.count(there) == 1
    content[content.index(there) + 1] ^= 1
    (path / SHARD).write_bytes(content)


def test_sums_are_of_each_matrix_of_a_stack_and_of_bytes() -> None:
    stack = tensors()[EXPERTS]
    assert sums_of(stack) == tuple(sums_of(matrix)[0] for matrix in stack)
    assert sums_of(stack.transpose(1, 2).contiguous().transpose(1, 2)) == sums_of(stack)
    assert sums_of(torch.tensor(0.0)) != sums_of(torch.tensor(-0.0))
    assert sums_of(torch.empty(2, 0, 3)) == (0, 0) and len(sums_of(torch.tensor(True))) == 1


def test_a_whole_checkpoint_is_proved(saved: Path) -> None:
    heard: list[tuple[int, int]] = []
    assert len(verify(saved, lambda done, total: heard.append((done, total))).tensors) == 4
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [(EXPERTS, 2, "expert 2 has other bytes"), ("model.norm", None, "model.norm in .* has other bytes")],
)
def test_a_changed_bit_is_found_when_it_is_read(saved: Path, name: str, part: int | None, message: str) -> None:
    value = tensors()[name]
    flip(saved, value if part is None else value[part])
    with pytest.raises(ValueError, match=message):
        verify(saved)
    into = {key: torch.zeros_like(tensor) for key, tensor in tensors().items()}
    with pytest.raises(ValueError, match=message):
        load(saved, into, MESH)


def test_a_weight_that_is_no_number_is_not_saved_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, MESH)
    checkpointer.save(1, tensors(), {})
    broken = tensors()
    broken[EXPERTS][3, 1, 1] = math.inf
    checkpointer.save(2, broken, {})
    with pytest.raises(OSError, match=rf"{EXPERTS}, expert 3, is not finite .*older checkpoints there are untouched"):
        checkpointer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpointer.close()


def test_checkpoints_of_older_versions_load_without_sums(saved: Path) -> None:
    raw = json.loads((saved / "meta.json").read_text())
    for entry in raw["tensors"].values():
        for chunk in entry["chunks"]:
            del chunk["sums"]
    (saved / "meta.json").write_text(json.dumps(raw))
    flip(saved, tensors()["model.norm"])
    verify(saved)
    load(saved, {key: torch.zeros_like(tensor) for key, tensor in tensors().items()}, MESH)


def test_the_command_proves_a_run_and_says_what_is_wrong(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--checkpoint", str(saved.parents[1])]) == 0
    said = capsys.readouterr().out
    assert "4 tensors, all 4 experts of each stack, there once with the bytes that were saved" in said
    assert main(["doctor", "--checkpoint", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summed"] is True
    flip(saved, tensors()[EXPERTS][0])
    assert main(["doctor", "--checkpoint", str(saved)]) == 2
    said = capsys.readouterr().err
    assert "expert 0 has other bytes than were saved" in said and "Traceback" not in said
