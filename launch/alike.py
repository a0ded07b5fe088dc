"""What has to be the same on every rank before they train: the versions of what computes, and the configuration.

Ranks of several hosts each have a Python of their own. Where those differ, losses silently do, or a collective hangs.
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed does not declare its stores as exported.

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .engine_config import EngineName
from .errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

_PACKAGES: Mapping[EngineName, tuple[str, ...]] = {
    "native": ("wastenot", "torch"),
    "deepspeed": ("wastenot", "torch", "deepspeed"),
    "megatron": ("wastenot", "torch", "megatron-core"),
}


@dataclass(frozen=True, kw_only=True)
class Makeup:
    """What one rank is made of."""

    rank: int
    host: str = field(default_factory=socket.gethostname)
    versions: Mapping[str, str]
    """By package; of Python too."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration, as plain values; empty where there is none."""


def versions(engine: EngineName = "native") -> dict[str, str]:
    """Versions of what computes under `engine`, read from metadata: nothing is imported.

    Of Python the first two numbers, of a package what precedes `+`: builds for CPU and CUDA go together.
    """
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python} | {name: _version(name) for name in _PACKAGES[engine]}


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "not installed"


def tell(store: dist.Store, mine: Makeup) -> None:
    """Leaves `mine` for the others; `compare` follows once all ranks have told."""
    store.set(f"makeup/{mine.rank}", json.dumps(asdict(mine)))
    store.add(f"makeup/{_digest(mine)}", 1)


def compare(store: dist.Store, mine: Makeup, world: int) -> None:
    """Raises UserError, the same on each of `world` ranks, where they are not alike; one question where they are."""
    if store.add(f"makeup/{_digest(mine)}", 0) == world:
        return
    found = [Makeup(**json.loads(store.get(f"makeup/{rank}"))) for rank in range(world)]
    raise UserError("; ".join(unlike(found)))


def _digest(makeup: Makeup) -> str:
    same = json.dumps([makeup.versions, makeup.config], sort_keys=True)
    return hashlib.sha256(same.encode()).hexdigest()


def unlike(found: Iterable[Makeup]) -> list[str]:
    """Where ranks differ, one sentence for versions and one for configurations; empty where they are alike."""
    found = sorted(found, key=lambda makeup: makeup.rank)
    sentences = []
    if views := _views(found, [makeup.versions for makeup in found]):
        sentences.append(f"versions differ: {views}; install the same on every host")
    if views := _views(found, [_flat(makeup.config) for makeup in found]):
        sentences.append(f"configurations differ: {views}; start every rank with the same one")
    return sentences


def _views(found: list[Makeup], values: list[Mapping[str, Any]]) -> str:
    """`name is A on rank 0 (host), B on rank 3 (host)` for each name, the first rank of each view."""
    differing = []
    for name in dict.fromkeys(name for of_rank in values for name in of_rank):
        first: dict[str, str] = {}
        for makeup, of_rank in zip(found, values, strict=True):
            first.setdefault(str(of_rank.get(name, "absent")), f"rank {makeup.rank} ({makeup.host})")
        if len(first) > 1:
            differing.append(f"{name} is {', '.join(f'{value} on {where}' for value, where in first.items())}")
    return ", ".join(differing)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
