"""What the kernel knows about this host's network: its interfaces, and which of them leads to an address."""

from __future__ import annotations

import ctypes
import ctypes.util
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

_IFF_UP = 0x1


@dataclass(frozen=True)
class Interface:
    """One address of one network interface that is up."""

    name: str
    address: str
    """IPv4 or IPv6, without a zone."""

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.address)


def is_loopback(address: str) -> bool:
    """Whether `address` (numeric) never leaves this host."""
    return address.startswith("127.") or address == "::1"


class _Address(ctypes.Structure):
    """`struct ifaddrs` of Linux's <ifaddrs.h>, as far as it is read here."""


_Address._fields_ = [
    ("next", ctypes.POINTER(_Address)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def interfaces() -> list[Interface]:
    """Addresses of all interfaces that are up, in the kernel's order; empty where the system is not Linux."""
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    head = ctypes.POINTER(_Address)()
    if libc.getifaddrs(ctypes.byref(head)):
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    found = []
    entry = head
    while entry:
        item = entry.contents
        address = _numeric(item.address)
        if item.flags & _IFF_UP and address:
            found.append(Interface(item.name.decode(), address))
        entry = item.next
    libc.freeifaddrs(head)
    return found


def _numeric(sockaddr: int | None) -> str | None:
    if not sockaddr:
        return None
    family = ctypes.c_ushort.from_address(sockaddr).value
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, ctypes.string_at(sockaddr + 4, 4))
    if family == socket.AF_INET6:
        return socket.inet_ntop(socket.AF_INET6, ctypes.string_at(sockaddr + 8, 16))
    return None


def source_address(host: str, port: int) -> str:
    """The address of this host from which packets to `host` leave; the kernel's routes decide, nothing is sent.

    Raises UserError where `host` has no address or no route leads there.
    """
    try:
        candidates = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR: {host} has no address on {socket.gethostname()} ({error}); use a name or a number that "
            "every host of the job resolves"
        ) from error
    problem: OSError | None = None
    for family, kind, protocol, _, where in candidates:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(where)
            except OSError as error:
                problem = error
                continue
            return probe.getsockname()[0].partition("%")[0]
    raise UserError(
        f"MASTER_ADDR: {host} cannot be reached from {socket.gethostname()} ({problem}); use an address of rank 0's "
        "host in a network that all hosts share"
    ) from problem


def interface_of(address: str) -> str | None:
    """Name of the interface that carries `address`, None where none does."""
    return next((interface.name for interface in interfaces() if interface.address == address), None)


def host_identity() -> str:
    """Equal for two processes exactly where 127.0.0.1 means the same to both: one kernel, one network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return socket.gethostname()
    return f"{boot.read_text().strip()}/{Path('/proc/self/ns/net').readlink()}"
