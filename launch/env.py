"""Which rank this process is: torchrun, mpirun, srun or no launcher at all become one Rank value.

`detect` reads environment variables and nothing else; `start` brings the ranks together. torch is imported by the
processes that train, not by the one that starts them.
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed does not declare its stores as exported.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from ..parallel.config import ParallelConfig
from .errors import UserError
from .nodelist import expand_counts, expand_hosts

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from .alike import Makeup

Launcher = Literal["none", "torchrun", "openmpi", "mpich", "srun"]

LISTENER = "WASTENOT_LISTENER"
"""Number of an open file on rank 0: the socket that its parent, `launch/local.py`, already listens on."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process among all that were started together."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among the ranks of its host."""
    local_world: int = 1
    """Ranks on its host."""
    launcher: Launcher = "none"
    """Who started it; `torchrun` is everyone who sets RANK and WORLD_SIZE, `mpich` is Intel MPI too."""
    address: str | None = None
    """Host where the ranks meet; None where mpirun's ranks have to agree on one."""
    port: int | None = None
    agent_store: bool = False
    """The store at that address already runs, in torchrun's agent; else rank 0 has to open it."""
    attempt: int = 0
    """How many times an elastic launcher has restarted the job."""
    listener: int | None = None
    """On rank 0, an open socket that listens on `port` already."""
    threads: int | None = None
    """Threads per rank where the user fixed them; None shares the host's cores out."""
    gloo_interface: str | None = None
    """Network interface the user chose for gloo; None finds the one that leads to `address`."""


def detect(environ: Mapping[str, str]) -> Rank:
    """Reads who this process is from `environ` (os.environ of a real one).

    The innermost launcher wins: torchrun, then mpirun, then srun, since each of these sets its variables inside
    the next. The variables of a batch script, of salloc or of an interactive shell are no launcher.

    Raises UserError naming the variable where the environment is partial or contradicts itself.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        rank = _from_torch(environ)
    elif "OMPI_COMM_WORLD_SIZE" in environ or "OMPI_COMM_WORLD_RANK" in environ:
        rank = _from_open_mpi(environ)
    elif _is_hydra(environ):
        rank = _from_hydra(environ)
    elif _is_srun(environ):
        rank = _from_srun(environ)
    elif "LOCAL_RANK" in environ:
        raise UserError("LOCAL_RANK is set but RANK and WORLD_SIZE are not; unset it, or start ranks with torchrun")
    else:
        rank = Rank()
    return replace(rank, threads=_threads(environ, rank), gloo_interface=environ.get("GLOO_SOCKET_IFNAME"))


def _from_torch(environ: Mapping[str, str]) -> Rank:
    read = _Reader(environ, "start ranks with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE")
    rank = read.place("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", launcher="torchrun")
    if "TORCHELASTIC_RUN_ID" not in environ:
        # torchrun started by mpirun or srun has other numbers than they; RANK left over in a shell must not.
        for other in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if other in environ and read.integer(other, 1) != rank.world:
                raise UserError(
                    f"WORLD_SIZE: {rank.world} contradicts {other}: {environ[other]}; unset RANK and WORLD_SIZE "
                    "to take mpirun's, or start ranks with torchrun"
                )
    address, port = read.meeting()
    if rank.world > 1 and (address is None or port is None):
        missing = "MASTER_ADDR" if address is None else "MASTER_PORT"
        raise UserError(
            f"{missing} is not set, and {rank.world} ranks need a place to meet; set MASTER_ADDR to rank 0's host "
            "and MASTER_PORT to a free port there, the same on every rank"
        )
    return replace(
        rank,
        address=address,
        port=port,
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=read.integer("TORCHELASTIC_RESTART_COUNT", 0) if "TORCHELASTIC_RESTART_COUNT" in environ else 0,
        listener=read.integer(LISTENER, 0) if LISTENER in environ else None,
    )


def _from_open_mpi(environ: Mapping[str, str]) -> Rank:
    read = _Reader(environ, "start ranks with mpirun, which sets all OMPI_COMM_WORLD_… variables")
    prefix = "OMPI_COMM_WORLD_"
    names = (f"{prefix}RANK", f"{prefix}SIZE", f"{prefix}LOCAL_RANK", f"{prefix}LOCAL_SIZE")
    address, port = read.meeting()
    return replace(read.place(*names, launcher="openmpi"), address=address, port=port)


def _is_hydra(environ: Mapping[str, str]) -> bool:
    # srun --mpi=pmi2 sets PMI_RANK too, and is srun; Hydra alone says which ranks share a host.
    return "MPI_LOCALRANKID" in environ or (("PMI_RANK" in environ or "PMI_SIZE" in environ) and not _is_srun(environ))


def _from_hydra(environ: Mapping[str, str]) -> Rank:
    read = _Reader(environ, "start ranks with the mpiexec of MPICH 3 or later or of Intel MPI, which sets it")
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    address, port = read.meeting()
    return replace(read.place(*names, launcher="mpich"), address=address, port=port)


def _is_srun(environ: Mapping[str, str]) -> bool:
    # SLURM_PROCID is set in a batch script as well, a step's node list by srun alone. A step of one task is a shell
    # that srun or salloc gave (or, in a job submitted from there, what its variables leave behind). SLURM_PTY_PORT
    # would tell of terminals too, but leaks from them into the ranks of submitted jobs.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS"))
    return "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ and tasks != "1"


def _from_srun(environ: Mapping[str, str]) -> Rank:
    read = _Reader(environ, "start ranks with srun, which sets it")
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    counts = expand_counts(read.text("SLURM_STEP_TASKS_PER_NODE"))
    node = read.integer("SLURM_NODEID", 0, len(counts))
    local = {**environ, "ranks on this node": str(counts[node])}
    place = _Reader(local, read.remedy).place(
        "SLURM_PROCID", tasks, "SLURM_LOCALID", "ranks on this node", launcher="srun"
    )
    address, port = read.meeting()
    if address is None:
        hosts = expand_hosts(read.text("SLURM_STEP_NODELIST"))
        address = "127.0.0.1" if len(hosts) == 1 else hosts[0]
    if port is None:
        # The same on every rank, below the ports the kernel gives out, and another one for each job and step.
        port = 15000 + (read.integer("SLURM_JOB_ID", 0) * 31 + read.integer("SLURM_STEP_ID", 0)) % 16000
    return replace(place, address=address, port=port)


def _threads(environ: Mapping[str, str], rank: Rank) -> int | None:
    if "OMP_NUM_THREADS" not in environ:
        return None
    threads = _Reader(environ, "set it to a number of threads, or unset it").integer("OMP_NUM_THREADS", 1)
    # torchrun itself writes 1 where it starts several ranks on a host: that says nothing about the user's wish.
    by_torchrun = "TORCHELASTIC_RUN_ID" in environ and rank.local_world > 1 and threads == 1
    return None if by_torchrun else threads


class _Reader:
    """Reads numbers from an environment; `remedy` says how such variables come to be set."""

    def __init__(self, environ: Mapping[str, str], remedy: str) -> None:
        self.environ = environ
        self.remedy = remedy

    def text(self, name: str) -> str:
        if name not in self.environ:
            raise UserError(f"{name} is not set; {self.remedy}")
        return self.environ[name]

    def integer(self, name: str, low: int, end: int | None = None, end_name: str = "") -> int:
        """The value of `name`, low <= value < end."""
        text = self.text(name)
        try:
            value = int(text)
        except ValueError:
            raise UserError(f"{name}: {text!r} is not a whole number; {self.remedy}") from None
        if value < low:
            raise UserError(f"{name}: {value} is below {low}; {self.remedy}")
        if end is not None and value >= end:
            bound = f"{end_name}: {end}" if end_name else str(end)
            raise UserError(f"{name}: {value} is not below {bound}; use {low} to {end - 1}; {self.remedy}")
        return value

    def place(self, rank: str, world: str, local_rank: str, local_world: str, *, launcher: Launcher) -> Rank:
        size = self.integer(world, 1)
        local_size = self.integer(local_world, 1, size + 1)
        return Rank(
            rank=self.integer(rank, 0, size, world),
            world=size,
            local_rank=self.integer(local_rank, 0, local_size, local_world),
            local_world=local_size,
            launcher=launcher,
        )

    def meeting(self) -> tuple[str | None, int | None]:
        """MASTER_ADDR and MASTER_PORT, where set."""
        port = None
        if "MASTER_PORT" in self.environ:
            port = _Reader(self.environ, "use a free port such as 29500").integer("MASTER_PORT", 1, 2**16)
        return self.environ.get("MASTER_ADDR") or None, port


def pick_device(rank: Rank) -> torch.device:
    """The accelerator of this rank's local number, or the CPU where there is none.

    Raises UserError where the host shows some devices but too few for its ranks.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:
        # Launchers may show each rank its own device only; `start` finds out if it is shared after all.
        return torch.device("cuda", 0)
    if rank.local_rank >= visible:
        raise UserError(
            f"rank {rank.rank} is number {rank.local_rank} on its host, which shows {visible} devices; start at "
            f"most {visible} ranks per host, or set CUDA_VISIBLE_DEVICES to nothing to train on CPUs"
        )
    return torch.device("cuda", rank.local_rank)


def start(
    rank: Rank, parallel: ParallelConfig, device: torch.device, makeup: Makeup | None = None
) -> dist.Store | None:
    """Brings the ranks together: threads, network interface, store, default process group.

    Returns the store of all ranks (`store.clone()` is a further connection to it), or None for a world of one
    rank, which needs no process group. Collectives give up some time after `parallel.timeout_seconds`, so that
    the watchdog speaks first. `makeup` is what all ranks must have alike; None is the installed versions alone.

    Raises UserError where the ranks do not find each other, share what they must not, or are unlike.
    """
    import torch

    from . import rendezvous

    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = rendezvous.backend(parallel.backend, device)
    if rank.world == 1:
        rendezvous.set_threads(rank, None)
        return None
    rank = rendezvous.locate(rank)
    store = rendezvous.meet(rank, timedelta(seconds=parallel.timeout_seconds), makeup)
    rendezvous.join(rank, store, backend, device, parallel.timeout_seconds)
    return store


def stop() -> None:
    """Takes the process group down, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
