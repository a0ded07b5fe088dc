"""Where ranks that mpirun started meet, when nobody said: rank 0 listens, and MPI tells the others where.

MPI is needed for these few messages only and is finalised right after, so that a rank may later end in any way.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import UserError
from .network import host_identity, interfaces

_PROBE_SECONDS = 3.0
_REMEDY = "point MPI4PY_LIBMPI to the libmpi.so of this mpirun, or set MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """A place that every rank reaches."""

    address: str
    port: int
    listener: socket.socket | None
    """On rank 0 the socket that already listens there, so that nobody else takes the port meanwhile."""


def agree(*, rank: int, world: int, address: str | None = None, port: int | None = None) -> Meeting:
    """Finds an address of rank 0's host that every rank reaches, and a free port there; every rank calls this.

    `address` and `port`, where given, are kept. Ranks of one host meet on its loopback interface; of several,
    each address of rank 0's host is tried from everywhere and the first that works for all is taken.

    Raises UserError (on every rank) without mpi4py, where mpi4py speaks to another MPI than mpirun's, and where no
    address works.
    """
    MPI = _load()
    started_here = not MPI.Is_initialized()
    if started_here:
        with warnings.catch_warnings():
            # mpi4py warns of what is said better below.
            warnings.simplefilter("ignore", RuntimeWarning)
            MPI.Init()
    communicator = MPI.COMM_WORLD
    if communicator.Get_size() != world:
        library = MPI.Get_library_version().splitlines()[0].partition(",")[0].strip()
        raise UserError(
            f"mpi4py sees {communicator.Get_size()} rank(s) where mpirun started {world}: it loaded {library}, not "
            f"the MPI of this mpirun; {_REMEDY}"
        )
    meeting = _meet(communicator, rank, address, port)
    if started_here:
        MPI.Finalize()
    if isinstance(meeting, str):
        raise UserError(meeting)
    return meeting


def _load() -> Any:
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        # mpi4py's wheels raise RuntimeError where they find no MPI library.
        raise UserError(
            f"ranks started by mpirun need mpi4py to find each other ({str(error).splitlines()[0]}): "
            f"pip install 'wastenot[mpi]'; {_REMEDY}"
        ) from error
    return MPI


def _meet(communicator: Any, rank: int, address: str | None, port: int | None) -> Meeting | str:
    """The meeting or what is wrong, the same on every rank: an error of one must not leave another waiting."""
    homes = communicator.allgather(host_identity())
    one_host = len(set(homes)) == 1
    listener, offer = None, None
    if rank == 0:
        try:
            listener = _listen(port or 0)
            offer = (listener.getsockname()[1], secrets.token_bytes(16), _candidates(one_host, address))
        except OSError as error:
            offer = f"MASTER_PORT: {port} cannot be used on rank 0's host ({error.strerror}); set another or none"
    offer = communicator.bcast(offer, root=0)
    if isinstance(offer, str):
        return offer
    chosen, token, candidates = offer
    if one_host or address is not None:
        return Meeting(address=candidates[0], port=chosen, listener=listener)
    with _greeting(listener, token):
        reached = communicator.allgather([_reaches(candidate, chosen, token) for candidate in candidates])
    for candidate, *by_rank in zip(candidates, *reached, strict=True):
        if all(by_rank):
            return Meeting(address=candidate, port=chosen, listener=listener)
    return (
        f"no address of rank 0's host ({', '.join(candidates) or 'it has none but loopback'}) can be reached from "
        "every rank; set MASTER_ADDR and MASTER_PORT to one that can (mpirun -x MASTER_ADDR=… -x MASTER_PORT=…)"
    )


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)


def _candidates(one_host: bool, address: str | None) -> list[str]:
    if address is not None:
        return [address]
    if one_host:
        return ["127.0.0.1"]
    found = [interface.address for interface in interfaces() if not interface.is_loopback]
    # Link-local addresses mean nothing without naming an interface of the host that uses them.
    found = [candidate for candidate in found if not candidate.startswith(("169.254.", "fe80:"))]
    return sorted(found, key=lambda candidate: ":" in candidate)


@contextlib.contextmanager
def _greeting(listener: socket.socket | None, token: bytes) -> Iterator[None]:
    """On rank 0, answers every connection with `token`: an address may lead other hosts to another machine."""
    if listener is None:
        yield
        return
    done = threading.Event()

    def greet() -> None:
        listener.settimeout(0.1)
        while not done.is_set():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(token)
        listener.settimeout(None)

    thread = threading.Thread(target=greet, name="rendezvous-greeting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _reaches(address: str, port: int, token: bytes) -> bool:
    try:
        with socket.create_connection((address, port), timeout=_PROBE_SECONDS) as connection:
            return connection.recv(len(token), socket.MSG_WAITALL) == token
    except OSError:
        return False
