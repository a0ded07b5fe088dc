"""Where ranks stand in a layout, and the command that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.places import lines, places
from wastenot.tools.cli import main

FOLDED = ParallelConfig(pipeline=2, shard=2, tensor=2, expert=4)


def test_consecutive_ranks_are_tensor_parallel_then_shards_then_copies_then_stages() -> None:
    found = places(FOLDED, 16)
    assert [place.rank for place in found] == list(range(16))
    assert lines(found, "tensor")[:3] == [(0, 1), (2, 3), (4, 5)]
    assert lines(found, "shard")[:3] == [(0, 2), (1, 3), (4, 6)]
    assert lines(found, "data")[0] == (0, 4)
    assert lines(found, "data", "shard")[:2] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert lines(found, "pipeline")[0] == (0, 8)


def test_experts_lie_over_the_ranks_of_a_stage() -> None:
    found = places(FOLDED, 16)
    assert lines(found, "expert") == [tuple(range(first, first + 4)) for first in (0, 4, 8, 12)]
    assert lines(found, "expert_data")[:2] == [(0, 4), (1, 5)]


@pytest.mark.parametrize("axis", ["pipeline", "data", "shard", "tensor", "expert_data", "expert"])
def test_every_rank_is_in_one_line_of_an_axis(axis: str) -> None:
    found = lines(places(FOLDED, 32), axis)
    assert sorted(rank for line in found for rank in line) == list(range(32))
    assert len({len(line) for line in found}) == 1


@pytest.mark.parametrize("world", [4, 12, 15])
def test_another_number_of_ranks_is_refused(world: int) -> None:
    with pytest.raises(ValueError, match=f"does not make {world} rank"):
        places(FOLDED, world)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("parallel: {tensor: 2, expert: 4}\nmodel: {moe: {experts: 8}}\n")
    return str(path)


def test_the_grid_names_ranks_experts_and_axes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--layout", config, "--ranks", "8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 ranks = pipeline 1 × data 4 × shard 1 × tensor 2; experts over 4" in shown
    assert "data 2 4: experts 0–1 of copy 1 5: experts 2–3 of copy 1" in shown
    assert "expert 4 0, 1, 2, 3 tokens travel" in shown


def test_json_has_every_rank_and_group(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--layout", config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world"] == 4
    assert found["axes"] == {"pipeline": 1, "data": 2, "shard": 1, "tensor": 2, "expert_data": 1, "expert": 4}
    assert found["ranks"][3]["experts"] == [6, 7]
    assert found["groups"]["data"] == [[0, 2], [1, 3]]


def test_the_picture_is_a_png(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra viz")
    assert main(["doctor", "--layout", config, "--picture", str(tmp_path / "ranks.png")]) == 0
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert "written:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "6"), "use 3"),
        (("--ranks", "0"), "--ranks: 0 is not a number of ranks"),
        (("-s", "parallel.tensor=0"), "use 1 or more"),
        (("--picture", "."), "is a folder"),
    ],
)
def test_bad_input_is_one_clear_line(
    config: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--layout", config, *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_arguments_of_the_grid_need_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--ranks", "4"]) == 2
    assert "--ranks belongs to --layout" in capsys.readouterr().err
