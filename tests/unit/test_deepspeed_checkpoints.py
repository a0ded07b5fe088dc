"""The folders of DeepSpeed's checkpoints."""

from __future__ import annotations

from wastenot.launch.engines.deepspeed_checkpoints import clean, find, prune


def test_a_checkpoint_that_cannot_be_removed_stops_nothing(tmp_path, caplog):
    for step in (1, 2, 3):
        (tmp_path / f"step-0000000{step}").mkdir()
        (tmp_path / f"step-0000000{step}" / "wastenot.json").touch()
    in_the_way = tmp_path / ".trash-step-00000002"
    (in_the_way / "something").mkdir(parents=True)
    prune(tmp_path, 1)
    assert sorted(each.name for each in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert "step-00000002 could not be removed" in caplog.text
    clean(tmp_path)
    prune(tmp_path, 1)
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000003"]
    assert find(tmp_path).name == "step-00000003"
