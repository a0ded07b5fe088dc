"""The wheel, installed where no checkout is in sight, is complete: commands, packaged configurations, training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = ("kernels", "parallel", "moe", "launch", "tools", "configs", "setup.py", "pyproject.toml", "README.md")


def run(*command: object, cwd: Path) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environ, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of a new virtual environment that has the wheel, and beside it only our dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in TOP:
        here = ROOT / name
        if here.is_dir():
            shutil.copytree(here, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("wastenot-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A plain line adds the folder but not the hooks in it, the editable install's among them.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=folder)
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if not name.startswith(("wastenot/", "wastenot-"))], "nothing at the top level"
    assert {"wastenot/configs/quickstart.yaml", "wastenot/tools/report/page.css"} <= set(names)
    assert {name for name in names if name.startswith("wastenot/launch/jobs/")}
    return folder / "venv" / "bin"


def test_imports_come_from_the_wheel(installed, tmp_path):
    where = run(installed / "python", "-c", "import wastenot.moe.decoder as d; print(d.__file__)", cwd=tmp_path)
    assert str(installed.parent) in where


def test_commands_and_packaged_configurations_work(installed, tmp_path):
    assert "train" in run(installed / "wastenot", "--help", cwd=tmp_path)
    resolved = json.loads(run(installed / "wastenot", "config", "quickstart", "--json", cwd=tmp_path))
    assert resolved["parallel"]["expert"] == 2
    assert run(installed / "wastenot", "--version", cwd=tmp_path).startswith("wastenot ")


def test_two_ranks_train(installed, tmp_path):
    (tmp_path / "words.txt").write_text("all that glitters is not gold, said the fox. " * 400)
    overrides = {
        "data.corpus": "words.txt",
        "data.tokenizer": "bytes",
        "data.seq_len": 16,
        "model.d_model": 16,
        "model.layers": 1,
        "model.heads": 2,
        "model.kv_heads": 2,
        "model.moe.d_expert": 16,
        "train.steps": 3,
        "train.batch": 4,
        "train.sample_tokens": 4,
        "schedule.warmup_steps": 1,
        "log.dir": "run",
        "log.tensorboard": "false",
    }
    arguments = [word for key, value in overrides.items() for word in ("-s", f"{key}={value}")]
    summary = json.loads(run(installed / "wastenot", "train", "quickstart", *arguments, "--json", cwd=tmp_path))
    assert (summary["steps"], summary["world"]) == (3, 2)
    assert (tmp_path / "run" / "summary.json").is_file()
