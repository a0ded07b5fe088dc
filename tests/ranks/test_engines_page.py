"""Every example of docs/engines.md runs as it stands in the page: its files, its commands, its scripts.

A machine without CUDA plays one for Megatron-Core: the shim is installed in every process of its two sections, before
anything of theirs runs (`sitecustomize`, which also keeps DeepSpeed from compiling).
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wastenot.launch.engine_config import what_is_missing

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
BLOCK = re.compile(r"^```(\w+)( torchrun)?\n(.*?)^```", re.M | re.S)
SHIMMED = """\
import os, sys
if os.environ.get("SECTION") == "Megatron-Core":
    sys.path.append({tests!r})
    import megatron_cpu_shim
    megatron_cpu_shim.install()
    megatron_cpu_shim.devices_on_cpu().__enter__()
elif os.environ.get("SECTION") == "DeepSpeed" and "RANK" in os.environ:
    # DeepSpeed would compile a collective of its own for half a minute, with whatever compiler there is.
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""


NEEDS = {"DeepSpeed": "deepspeed", "deepspeed": "deepspeed", "Megatron-Core": "megatron", "megatron": "megatron"}
"""What word in a section's name asks for which engine."""


def missing(section: str) -> str:
    """What the examples of `section` need and is not here; or nothing."""
    engines = {engine for word, engine in NEEDS.items() if word in section}
    if section == "Clusters":
        engines.add("deepspeed")
        if shutil.which("mpirun", path=PATH) is None:
            return "no mpirun; pip install 'wastenot[mpi]'"
    return next((reason for engine in engines if (reason := what_is_missing(engine))), "")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, in which the page's files are written and its commands run."""
    folder = tmp_path_factory.mktemp("engines")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
    (folder / "text.txt").write_text(" ".join(draw.choices(words, k=4000)), encoding="utf-8")
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SHIMMED.format(tests=str(ROOT / "tests")), encoding="utf-8")
    return folder


def run(command: list[str], home: Path, section: str) -> str:
    """What `command` prints; raises AssertionError, with that, where it fails."""
    environ = os.environ | {
        "PATH": PATH,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu",
    }
    if not torch.cuda.is_available():
        kinds = [kind for kind in ("Megatron-Core", "DeepSpeed") if kind.split("-")[0].lower() in section.lower()]
        environ["SECTION"] = kinds[0] if kinds else ""
        paths = [str(home / "site"), os.environ.get("PYTHONPATH", "")]
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(command, cwd=home, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_page_has_a_section_for_each_engine():
    assert {"engine: deepspeed", "engine: megatron", "In transformers", "Clusters"} <= set(SECTIONS)
    kinds = {
        section: [(kind, launcher) for kind, launcher, _ in BLOCK.findall(text)] for section, text in SECTIONS.items()
    }
    assert kinds["In a DeepSpeed job"] == kinds["In a Megatron-Core job"] == [("python", " torchrun")]


@pytest.mark.parametrize("section", [name for name, text in SECTIONS.items() if BLOCK.search(text)])
def test_the_examples_of_a_section_run(section: str, home: Path):
    if reason := missing(section):
        pytest.skip(reason)
    # Commands of a later section may be about a file of an earlier one.
    for text in SECTIONS.values():
        for kind, _, block in BLOCK.findall(text):
            if kind == "yaml":
                (home / re.findall(r"^# (\S+)", block)[0]).write_text(block, encoding="utf-8")
    for kind, launcher, block in BLOCK.findall(SECTIONS[section]):
        if kind == "sh":
            for line in block.splitlines():
                run(shlex.split(line), home, section)
        elif kind == "python":
            script = home / "example.py"
            script.write_text(block, encoding="utf-8")
            start = ["torchrun", "--standalone", "--nproc-per-node", "2"] if launcher else [sys.executable]
            run([*start, str(script)], home, section)


def test_what_the_examples_left_is_what_the_page_says(home: Path):
    """After the sections above: the same losses by torchrun and mpirun, DeepSpeed's JSON, a native run."""

    def losses(name: str) -> list[float]:
        lines = (home / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    for name in ("zero", "by-torchrun", "by-mpirun", "megatron"):
        if not (home / "runs" / name).exists():
            pytest.skip("a section that makes one of these runs was skipped, or not selected")
    assert losses("by-torchrun") == losses("by-mpirun") == losses("zero")
    assert losses("megatron") == pytest.approx(losses("zero"), rel=1e-4)
    assert json.loads((home / "runs" / "zero" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 1
    assert (home / "runs" / "zero-native" / "config.yaml").exists()
    assert "#SBATCH --nodes=2" in (home / "job.sh").read_text(encoding="utf-8")
