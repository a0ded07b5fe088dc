"""`wastenot launch`: scripts that a shell can read, with nothing left to fill in; what does not fit is refused."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from wastenot.tools.cli import main
from wastenot.tools.launch import fill

EVERYTHING = [
    ["slurm", "quickstart", "--nodes", "2", "--gpus-per-node", "1", "--time", "1-00:00:00", "--partition", "gpu"],
    ["slurm", "quickstart", "--nodes", "1", "--cpus-per-rank", "4", "--account", "me"],
    ["mpi", "quickstart", "--nodes", "2", "--hosts", "node1,node2"],
    ["mpi", "quickstart", "--nodes", "1"],
    ["mpi", "quickstart", "--nodes", "2", "--hosts", "node1,node2", "--flavour", "mpich"],
    ["mpi", "quickstart", "--nodes", "1", "--flavour", "intel"],
    ["torchrun", "quickstart", "--nodes", "2", "--hosts", "node1,node2", "--port", "4000"],
    ["torchrun", "quickstart", "--nodes", "1"],
]


def script_of(arguments: list[str], capsys) -> str:
    assert main(["launch", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", EVERYTHING, ids=" ".join)
def test_scripts_are_complete_and_legal_shell(arguments, capsys):
    script = script_of([*arguments, "-s", "log.dir=runs/it's mine"], capsys)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "@" not in script.replace("options[@]", "").replace("TERM@120", "")
    command = next(line for line in script.splitlines() if "wastenot.launch.train " in line and line[0] != "#")
    assert shlex.split(command)[-2:] == ["quickstart", "--set=log.dir=runs/it's mine"]
    assert f"PYTHON={sys.executable}" in script


def test_options_reach_their_launcher(capsys):
    slurm = script_of(EVERYTHING[0], capsys)
    for line in ("nodes=2", "ntasks-per-node=1", "gpus-per-node=1", "time=1-00:00:00", "partition=gpu"):
        assert f"#SBATCH --{line}\n" in slurm
    assert "cpus-per-task" not in slurm and "account" not in slurm
    cpus = script_of(EVERYTHING[1], capsys)
    assert "#SBATCH --cpus-per-task=4\n" in cpus and "SRUN_CPUS_PER_TASK=4" in cpus
    assert '--host "node1:1,node2:1"' in script_of(EVERYTHING[2], capsys)
    assert "--host" not in script_of(EVERYTHING[3], capsys)
    hydra = script_of(EVERYTHING[4], capsys)
    assert "-n 2\n    -ppn 1\n    -hosts node1:1,node2:1\n" in hydra
    assert "-hosts" not in script_of(EVERYTHING[5], capsys)
    assert "--rdzv-endpoint=node1:4000" in script_of(EVERYTHING[6], capsys)
    assert "--rdzv-endpoint=localhost:0" in script_of(EVERYTHING[7], capsys)


def test_a_line_without_its_value_is_left_out():
    assert fill("a @X@\nb @Y@\nc", {"X": "1 2", "Y": None}) == "a '1 2'\nc\n"


def test_a_file_is_written_ready_to_run(tmp_path, capsys):
    file = tmp_path / "job.sh"
    said = script_of([*EVERYTHING[3], "-o", str(file)], capsys)
    assert f"bash {file}" in said
    assert file.stat().st_mode & 0o111
    assert main(["launch", *EVERYTHING[3], "-o", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"script": file.read_text(), "file": str(file)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm", "quickstart", "--nodes", "3", "--ranks-per-node", "1"], "parallel.expert: 2 does not divide the 3"),
        (["mpi", "quickstart", "--nodes", "2", "--hosts", "a"], "--hosts: 1 names for --nodes 2; give 2"),
        (["mpi", "quickstart", "--nodes", "1", "--hosts", "a;b"], "not a list of host names"),
        (["torchrun", "quickstart", "--nodes", "2"], "--hosts: torchrun's agents need to know where to meet"),
        (["torchrun", "quickstart", "--nodes", "2", "--hosts", "a,b", "--submit"], "copy the script to all 2"),
        (["slurm", "quickstart", "--nodes", "0"], "'0' is not a number of 1 or more"),
        (["slurm", "quickstart", "--nodes", "2", "--time", "soon"], "'soon' is not a time limit; use for example"),
        (["slurm", "quickstart", "--nodes", "2", "--partition", "a b"], "'a b' is not a plain name"),
        (["slurm", "quickstart"], "required: --nodes"),
        (["slurm", "no-such-config", "--nodes", "1"], "no-such-config"),
        (["slurm", "quickstart", "--nodes", "2", "--submit"], "--submit: no sbatch on PATH"),
        (["slurm", "quickstart", "--nodes", "2", "-o", "/no/such/folder/x"], "--output: /no/such/folder/x cannot be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ")
    assert captured.out == ""


NOTICE = "This cluster rests on Sunday."


@pytest.mark.parametrize(
    ("submitted", "code", "expected", "last_line"),
    [
        ("Submitted batch job 7", 0, 0, f"sbatch: {NOTICE}"),
        ("Submitted batch job 7", 3, 1, "error: the job ended with exit code 3"),
        ("", 1, 2, f"error: --submit: sbatch refused the job: {NOTICE}"),
    ],
    ids=["accepted", "failed", "refused"],
)
def test_a_job_that_failed_is_not_one_that_sbatch_refused(
    submitted, code, expected, last_line, tmp_path, monkeypatch, capfd
):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nread line\necho 'sbatch: {NOTICE}' >&2\nprintf '{submitted}'\nexit {code}\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["launch", "slurm", "quickstart", "--nodes", "2", "--submit"]) == expected
    captured = capfd.readouterr()
    assert captured.out == submitted
    assert NOTICE in captured.err and captured.err.splitlines()[-1] == last_line
