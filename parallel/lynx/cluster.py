"""The machines: a device, links from the inside out, and how much of their peaks is reached; read from YAML.

    device: {name, memory: 79GiB, bandwidth: 3.35TB/s, launch: 3us, peak: {bf16: 989.4TFLOP/s, ...}}
    links: [{name, devices: 8, latency: 3us, bandwidth: 450GB/s, collective: 0.8, all_to_all: 0.7, slowdown: 0.9}]
    efficiency: {matmul: 0.7, grouped: 0.6, attention: 0.6, attention_backward: 0.5, memory: 0.8}
    allowance: {context: 2GiB, fragmentation: 0.04}

Every figure here may be replaced by a measured one (`calibration.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from .layout import Group
from .nearest import refuse_unknown_keys, suggestion
from .units import Unit, parse_quantity


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or one process of a CPU."""

    name: str
    memory: float
    """Bytes that a program may have."""
    bandwidth: float
    """Of its memory, bytes/s."""
    peak: Mapping[str, float]
    """FLOP/s of matrix products by dtype."""
    launch: float
    """Seconds that a kernel takes however small it is."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A level of the network: what devices within its reach, and beyond that of the level inside, talk through."""

    name: str
    devices: int
    """How many it connects; the outermost may leave it out: all there are."""
    latency: float
    """Seconds of one message."""
    bandwidth: float
    """Bytes/s that one device sends, and at the same time receives."""
    collective: float
    """Part of the bandwidth that all-reduce, all-gather, reduce-scatter and send/receive reach."""
    all_to_all: float
    """Part of the bandwidth that an all-to-all reaches."""
    slowdown: float
    """rho: speed of compute while this link is busy, as a part of its speed alone; (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Parts of the device's peaks that kernels reach."""

    matmul: float
    grouped: float
    """Of the experts' grouped matrix products."""
    attention: float
    attention_backward: float
    memory: float
    """Of the memory's bandwidth, where that is the bound."""


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """Memory that is no tensor's."""

    context: float
    """Bytes of driver, libraries and communication buffers."""
    fragmentation: float
    """Part of the device's memory that the allocator cannot use."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices of one kind and the links between them."""

    name: str
    device: Device
    links: tuple[Link, ...]
    """From the inside out; the last reaches all devices."""
    efficiency: Efficiency
    allowance: Allowance

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products in `dtype`. Raises ValueError where the device has none."""
        if dtype not in self.device.peak:
            raise ValueError(f"{self.name}: device.peak has no {dtype}; {suggestion(dtype, self.device.peak)}")
        return self.device.peak[dtype]


_NO_LIMIT = 2**40
"""Devices that an outermost link reaches."""


def reach(cluster: Cluster, group: Group) -> tuple[int, ...]:
    """Of `group`, the members that one of them reaches through each link and those inside it, itself among them.

    Groups start where links do (rank 0, and every `size` x `stride`-th): with sizes that are powers of two or multiples
    of a node, as usual, that is exact. Raises ValueError where the cluster is too small for the group.
    """
    found = [min(group.size, max(1, link.devices // group.stride)) for link in cluster.links]
    if found[-1] < group.size:
        raise ValueError(
            f"{cluster.name}: {group.size} ranks at a distance of {group.stride} are more than its "
            f"{cluster.links[-1].devices} devices; use fewer"
        )
    return tuple(found)


def outermost(cluster: Cluster, group: Group) -> Link:
    """The link through which the farthest members of `group` talk."""
    spans = reach(cluster, group)
    return cluster.links[next(i for i, span in enumerate(spans) if span == group.size)]


def shipped_clusters() -> dict[str, str]:
    """YAML of the clusters that come with the package, by name."""
    folder = files("wastenot.configs").joinpath("clusters")
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in entries}


def read_cluster(name: str) -> Cluster:
    """The shipped cluster `name`, or the one in the YAML file of that path.

    Raises ValueError in one line for an unknown name or key, a missing one, a missing unit, or a value out of range.
    """
    path = Path(name)
    if path.is_file():
        return cluster_from(_parsed(path.read_text(encoding="utf-8"), name), path.stem, name)
    known = shipped_clusters()
    if name not in known:
        raise ValueError(f"cluster: no file and no cluster is called {name!r}; {suggestion(name, known)}")
    return cluster_from(_parsed(known[name], name), name, name)


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def cluster_from(given: object, name: str, where: str) -> Cluster:
    """The cluster that the plain values `given` describe; errors name `where` they are from."""
    top = _section(given, where, ("source", "device", "links", "efficiency", "allowance"), optional=("source",))
    links = top["links"]
    if not isinstance(links, list) or not links:
        raise ValueError(f"{where}: links: {links!r} is no list; give at least one link, the innermost first")
    found = tuple(_link(link, f"{where}: links[{i}]", i == len(links) - 1) for i, link in enumerate(links))
    for inner, outer in pairwise(found):
        if outer.devices <= inner.devices:
            raise ValueError(
                f"{where}: links: {outer.name} connects {outer.devices} devices, no more than {inner.name} inside it; "
                f"use more than {inner.devices}"
            )
    return Cluster(
        name=name,
        device=_device(top["device"], f"{where}: device"),
        links=found,
        efficiency=efficiency_from(top["efficiency"], f"{where}: efficiency"),
        allowance=_allowance(top["allowance"], f"{where}: allowance"),
    )


def _section(given: object, where: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """`given`, a mapping with these keys. Raises ValueError at the first that is unknown or missing."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: {given!r} is no mapping; its keys are {', '.join(keys)}")
    refuse_unknown_keys(given, keys, where)
    for key in keys:
        if key not in given and key not in optional:
            raise ValueError(f"{where}: {key} is missing; its keys are {', '.join(keys)}")
    return given


def _device(given: object, where: str) -> Device:
    section = _section(given, where, tuple(field.name for field in fields(Device)))
    peaks = section["peak"]
    if not isinstance(peaks, Mapping) or not peaks:
        raise ValueError(
            f"{where}.peak: {peaks!r} is no mapping of dtypes to FLOP/s; give for example bf16: 989TFLOP/s"
        )
    return Device(
        name=str(section["name"]),
        memory=parse_quantity(section["memory"], "B", f"{where}.memory"),
        bandwidth=parse_quantity(section["bandwidth"], "B/s", f"{where}.bandwidth"),
        peak={str(dtype): parse_quantity(peak, "FLOP/s", f"{where}.peak.{dtype}") for dtype, peak in peaks.items()},
        launch=parse_quantity(section["launch"], "s", f"{where}.launch"),
    )


def _link(given: object, where: str, is_last: bool) -> Link:
    optional = ("devices",) if is_last else ()
    section = _section(given, where, tuple(field.name for field in fields(Link)), optional)
    devices = section.get("devices", _NO_LIMIT)
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ValueError(f"{where}.devices: {devices!r} is no number of devices; use a whole number, 1 or more")
    return Link(
        name=str(section["name"]),
        devices=devices,
        **{key: link_value(key, section[key], f"{where}.{key}") for key in LINK_UNITS},
    )


LINK_UNITS: Mapping[str, Unit | None] = {
    "latency": "s",
    "bandwidth": "B/s",
    "collective": None,
    "all_to_all": None,
    "slowdown": None,
}
"""Units of a link's figures; None: a part of 1."""


def link_value(key: str, value: object, where: str) -> float:
    """The figure `key` of a link. Raises ValueError as `parse_quantity` and `_part` do."""
    unit = LINK_UNITS[key]
    return _part(value, where) if unit is None else parse_quantity(value, unit, where)


def efficiency_from(given: object, where: str) -> Efficiency:
    """The section `efficiency`. Raises ValueError at what it cannot be."""
    keys = tuple(field.name for field in fields(Efficiency))
    section = _section(given, where, keys)
    return Efficiency(**{key: _part(section[key], f"{where}.{key}") for key in keys})


def _allowance(given: object, where: str) -> Allowance:
    section = _section(given, where, tuple(field.name for field in fields(Allowance)))
    fragmentation = section["fragmentation"]
    lost = 0.0 if fragmentation == 0 else _part(fragmentation, f"{where}.fragmentation")
    return Allowance(context=parse_quantity(section["context"], "B", f"{where}.context"), fragmentation=lost)


def _part(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        nearest = 1 if isinstance(value, int | float) and value > 1 else 0.8
        raise ValueError(f"{where}: {value!r} is no part of 1; use a number in (0, 1], for example {nearest}")
    return float(value)
