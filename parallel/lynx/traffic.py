"""Collectives over links from the inside out: bytes per link, exactly, and seconds by latency and bandwidth.

With k_l members of the group within reach of link l (k_0 = 1, the last k_L = n) and B bytes in all, one rank sends

    reduce-scatter, all-gather   B (1/k_{l-1} - 1/k_l)     in all B (n-1)/n
    all-reduce                   twice that                 in all 2 B (n-1)/n
    all-to-all                   B (k_l - k_{l-1}) / n      in all B (n-1)/n

over link l: reductions work inside a node first, so that what leaves it is small; an all-to-all sends each pair its
own. Links work at the same time (collectives are cut into pieces), so the slowest one counts, and latencies add up: one
per doubling of the members. Both are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .cluster import Cluster, Link, reach
from .layout import Group


def reduce_scatter_bytes(spans: Sequence[int], size: float) -> tuple[float, ...]:
    """Bytes that one rank sends over each link to reduce `size` bytes and keep its part; the same as of all-gather."""
    return tuple(size * (1 / inner - 1 / outer) for inner, outer in _levels(spans))


def all_reduce_bytes(spans: Sequence[int], size: float) -> tuple[float, ...]:
    """Bytes that one rank sends over each link to sum `size` bytes on all."""
    return tuple(2 * volume for volume in reduce_scatter_bytes(spans, size))


def all_to_all_bytes(spans: Sequence[int], size: float) -> tuple[float, ...]:
    """Bytes that one rank sends over each link where each member, itself included, gets an equal part of `size`."""
    return tuple(size * (outer - inner) / spans[-1] for inner, outer in _levels(spans))


def reduce_scatter_seconds(cluster: Cluster, group: Group, size: float) -> float:
    """Of `size` bytes on every rank of `group`; all-gather to `size` bytes takes as long."""
    spans = reach(cluster, group)
    return _seconds(cluster, spans, reduce_scatter_bytes(spans, size))


def all_reduce_seconds(cluster: Cluster, group: Group, size: float) -> float:
    """Of `size` bytes on every rank of `group`."""
    spans = reach(cluster, group)
    return 2 * _latency(cluster, spans) + _transfer(cluster, all_reduce_bytes(spans, size))


def all_to_all_seconds(cluster: Cluster, group: Group, volumes: Sequence[float]) -> float:
    """Where the slowest rank of `group` moves `volumes` bytes over each link."""
    return _seconds(cluster, reach(cluster, group), volumes, is_all_to_all=True)


def send_seconds(cluster: Cluster, distance: int, size: float) -> float:
    """Of `size` bytes to the rank that is `distance` ranks away."""
    link = next((link for link in cluster.links if distance < link.devices), cluster.links[-1])
    return link.latency + size / (link.bandwidth * link.collective)


def _levels(spans: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([1, *spans], spans, strict=False))


def _seconds(cluster: Cluster, spans: Sequence[int], volumes: Sequence[float], *, is_all_to_all: bool = False) -> float:
    return _latency(cluster, spans) + _transfer(cluster, volumes, is_all_to_all=is_all_to_all)


def _latency(cluster: Cluster, spans: Sequence[int]) -> float:
    doublings = (math.ceil(math.log2(outer / inner)) for inner, outer in _levels(spans))
    return sum(link.latency * steps for link, steps in zip(cluster.links, doublings, strict=True))


def _transfer(cluster: Cluster, volumes: Sequence[float], *, is_all_to_all: bool = False) -> float:
    def speed(link: Link) -> float:
        return link.bandwidth * (link.all_to_all if is_all_to_all else link.collective)

    return max(volume / speed(link) for link, volume in zip(cluster.links, volumes, strict=True))
