"""Environment variables become one Rank, whoever started the process; contradictions name their variable."""

from __future__ import annotations

import subprocess
import sys

import pytest

from wastenot.launch.cores import physical_cores, threads
from wastenot.launch.env import Rank, detect
from wastenot.launch.errors import UserError
from wastenot.launch.network import host_identity, interface_of, interfaces, source_address
from wastenot.launch.nodelist import expand_counts, expand_hosts

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH = {
    "SLURM_JOB_ID": "1234",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_JOB_NODELIST": "n[08-10]",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
SRUN = BATCH | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "7",
    "SLURM_STEP_NODELIST": "n[08-10]",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_no_launcher_is_a_world_of_one():
    assert detect({"PATH": "/bin"}) == Rank()


def test_torchrun():
    assert detect(TORCHRUN) == Rank(
        rank=5,
        world=8,
        local_rank=1,
        local_world=4,
        launcher="torchrun",
        address="node0",
        port=29500,
        agent_store=True,
        attempt=2,
    )


@pytest.mark.parametrize(("variables", "launcher"), [(OPEN_MPI, "openmpi"), (HYDRA, "mpich")])
def test_mpirun_without_and_with_an_address(variables, launcher):
    place = {"rank": 3, "world": 4, "local_rank": 1, "local_world": 2, "launcher": launcher}
    assert detect(variables) == Rank(**place)
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert detect(variables | given) == Rank(**place, address="10.0.0.1", port=4000)


def test_srun_meets_on_the_first_host_of_its_step():
    rank = detect(SRUN)
    assert rank == Rank(rank=3, world=5, local_rank=1, local_world=2, launcher="srun", address="n08", port=rank.port)
    assert rank.port is not None and 15000 <= rank.port < 32000
    assert detect(SRUN | {"SLURM_PROCID": "4", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}).local_world == 1
    assert detect(SRUN | {"SLURM_STEP_ID": "8"}).port != rank.port
    assert detect(SRUN | {"MASTER_ADDR": "n09", "MASTER_PORT": "4000"}).address == "n09"


def test_srun_on_one_node_meets_on_loopback():
    one = SRUN | {"SLURM_STEP_NODELIST": "n08", "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"}
    assert detect(one).address == "127.0.0.1"


ONE_TASK = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "n08"}


@pytest.mark.parametrize(
    "shell",
    [BATCH, BATCH | ONE_TASK | {"SLURM_PTY_PORT": "40000"}],
    ids=["sbatch script", "shell of salloc, and sbatch script submitted from it"],
)
def test_a_shell_that_slurm_gave_is_no_launcher(shell):
    assert detect(shell).launcher == "none"


def test_srun_in_a_job_submitted_from_an_interactive_shell_is_still_srun():
    assert detect(SRUN | {"SLURM_PTY_PORT": "40000"}).launcher == "srun"


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        (SRUN | TORCHRUN, "torchrun"),
        (BATCH | TORCHRUN, "torchrun"),
        (OPEN_MPI | TORCHRUN, "torchrun"),
        (SRUN | OPEN_MPI, "openmpi"),
        (SRUN | HYDRA, "mpich"),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "5"}, "srun"),
        (SRUN | {"PMIX_RANK": "3"}, "srun"),
    ],
    ids=[
        "torchrun in srun",
        "torchrun in sbatch",
        "torchrun in mpirun",
        "mpirun in Slurm",
        "mpiexec in Slurm",
        "srun --mpi=pmi2",
        "srun --mpi=pmix",
    ],
)
def test_the_innermost_launcher_wins(variables, launcher):
    assert detect(variables).launcher == launcher


def without(variables: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in variables.items() if key != name}


ONE_HOST = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE is not set; start ranks with torchrun"),
        (without(TORCHRUN, "RANK"), "RANK is not set"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE is not set"),
        (TORCHRUN | {"RANK": "8"}, "RANK: 8 is not below WORLD_SIZE: 8; use 0 to 7"),
        (TORCHRUN | {"RANK": "-1"}, "RANK: -1 is below 0"),
        (TORCHRUN | {"RANK": "two"}, "RANK: 'two' is not a whole number"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE: 0 is below 1"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK: 4 is not below LOCAL_WORLD_SIZE: 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE: 9 is not below 9; use 1 to 8"),
        (TORCHRUN | {"MASTER_PORT": "66000"}, "MASTER_PORT: 66000 is not below 65536.*29500"),
        (ONE_HOST, "MASTER_ADDR is not set, and 2 ranks need a place to meet"),
        (ONE_HOST | {"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set but RANK and WORLD_SIZE are not"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set; start ranks with mpirun"),
        (without(HYDRA, "MPI_LOCALRANKID"), "MPI_LOCALRANKID is not set; start ranks with the mpiexec"),
        (OPEN_MPI | ONE_HOST, "WORLD_SIZE: 2 contradicts OMPI_COMM_WORLD_SIZE: 4; unset RANK"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1-"}, "SLURM_STEP_NODELIST: 'n.1-' is not a Slurm host list"),
        (SRUN | {"SLURM_NODEID": "3"}, "SLURM_NODEID: 3 is not below 3"),
        ({"OMP_NUM_THREADS": "all"}, "OMP_NUM_THREADS: 'all' is not a whole number"),
    ],
)
def test_partial_and_contradicting_environments_name_the_variable(variables, message):
    with pytest.raises(UserError, match=message):
        detect(variables)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        (OPEN_MPI | {"OMP_NUM_THREADS": "1"}, 1),
        # torchrun's own doing, where it starts several ranks on a host ...
        (TORCHRUN | {"OMP_NUM_THREADS": "1"}, None),
        # ... and what the user wrote.
        (TORCHRUN | {"OMP_NUM_THREADS": "2"}, 2),
        (TORCHRUN | {"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, 1),
        ({}, None),
    ],
)
def test_threads_are_fixed_only_by_the_user(variables, expected):
    assert detect(variables).threads == expected


def test_cores_are_shared_out_and_never_fewer_than_one():
    assert threads(frozenset(range(8)), sharing=2) <= 4
    assert threads(frozenset({0}), sharing=4) == 1
    assert physical_cores()


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],login", ["n1", "n2", "n3", "n7", "login"]),
        ("gpu-0[08-10]", ["gpu-008", "gpu-009", "gpu-010"]),
        ("r[0-1]n[1-2]-ib", ["r0n1-ib", "r0n2-ib", "r1n1-ib", "r1n2-ib"]),
    ],
)
def test_host_lists_of_slurm(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-3", "n[3-1]", "n[a]", "n1,", "n[]"])
def test_what_is_no_host_list_is_refused(text):
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        expand_hosts(text)


def test_task_counts_of_slurm():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE"):
        expand_counts("2x3")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's interfaces through Linux's getifaddrs")
def test_the_interface_that_leads_to_an_address_comes_from_the_kernel():
    loopback = interface_of("127.0.0.1")
    assert loopback in {interface.name for interface in interfaces() if interface.is_loopback}
    assert interface_of(source_address("127.0.0.1", 1)) == loopback
    for interface in interfaces():
        if not interface.is_loopback and ":" not in interface.address:
            # To one's own address packets take the loopback device, yet gloo needs the interface that carries it.
            assert interface_of(source_address(interface.address, 1)) == interface.name


def test_an_address_nobody_knows_is_an_error_of_the_user():
    with pytest.raises(UserError, match=r"MASTER_ADDR: no-such-host\.invalid has no address"):
        source_address("no-such-host.invalid", 29500)


def test_processes_of_one_host_have_one_identity():
    code = "from wastenot.launch.network import host_identity; print(host_identity())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == host_identity()


def test_detecting_a_rank_needs_no_torch():
    code = "import sys, wastenot.launch.env, wastenot.launch.local; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
