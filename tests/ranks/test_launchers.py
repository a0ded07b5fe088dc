"""The same run under every launcher has the same losses, bit for bit: one code path, whoever starts it."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from wastenot.launch.config import DataConfig
from wastenot.launch.corpus import prepare_files
from wastenot.launch.metrics import read_metrics

TOOLS = Path(sysconfig.get_path("scripts"))
CONFIG = """
model: {{d_model: 32, layers: 2, heads: 2, moe: {{experts: 4, d_expert: 32, shared_experts: 1}}}}
router: {{capacity_factor: 1.25}}
parallel: {{expert: 2}}
schedule: {{warmup_steps: 2}}
data: {{corpus: {corpus}, seq_len: 32}}
train: {{steps: 8, batch: 8, accumulate: 2, sample_tokens: 0}}
log: {{every: 1, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    draw = random.Random(0)
    (folder / "noise.txt").write_text("".join(draw.choice("abcde ") for _ in range(20_000)))
    corpus = prepare_files([folder / "noise.txt"], DataConfig(tokenizer="bytes", dir=str(folder / "data")))
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(corpus=corpus))
    return path


def losses(folder: Path) -> list[tuple[float, float]]:
    found = [(line["loss"], line["grad_norm"]) for line in read_metrics(folder) if "loss" in line]
    assert len(found) == 8
    return found


def run(*command: object) -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def local(config) -> list[tuple[float, float]]:
    """What `wastenot train` gives when it starts the ranks itself."""
    folder = config.parent / "local"
    run(sys.executable, "-m", "wastenot.tools.cli", "train", config, "-s", f"log.dir={folder}")
    return losses(folder)


def test_torchrun(config, local, tmp_path):
    run(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
        *("-m", "wastenot.launch.train", config, "-s", f"log.dir={tmp_path}"),
    )
    assert losses(tmp_path) == local


def test_mpirun(config, local, tmp_path):
    pytest.importorskip("mpi4py", reason="needs the extra `mpi`", exc_type=ImportError)
    if not (TOOLS / "mpirun").exists():
        pytest.skip("needs the extra `mpi`: no mpirun beside this Python")
    run(
        *(TOOLS / "mpirun", "-n", 2, "--oversubscribe", "--allow-run-as-root"),
        *(sys.executable, "-m", "wastenot.launch.train", config, "-s", f"log.dir={tmp_path}"),
    )
    assert losses(tmp_path) == local


def test_ranks_of_another_version_are_refused_before_they_train(config, tmp_path):
    other = tmp_path / "wastenot-9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: wastenot\nVersion: 9.9\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "wastenot.launch.train", config, "-s", f"log.dir={tmp_path / 'log'}"]
    processes = []
    for rank, path in enumerate([os.environ.get("PYTHONPATH", ""), f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"]):
        environ = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path}
        processes.append(subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        (line,) = said.splitlines()
        assert line.startswith("error: versions differ: wastenot is ")
        assert "9.9 on rank 1" in line and line.endswith("; install the same on every host")
    assert not (tmp_path / "log").exists()
