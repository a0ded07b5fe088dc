"""Seconds of one operator on one device: a roofline over measured efficiencies, and a floor for the launch."""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import Cluster


@dataclass(frozen=True)
class Roofline:
    """Times operators of `dtype` on the devices of `cluster`."""

    cluster: Cluster
    dtype: str

    def matmul(self, m: float, n: float, k: float, width: int, *, dtype: str = "") -> float:
        """Seconds of [m, k] times [k, n], numbers of `width` bytes; 0 where a side is."""
        if not m * n * k:
            return 0.0
        return self._bound(
            2 * m * n * k, width * (m * k + k * n + m * n), self.cluster.efficiency.matmul, dtype or self.dtype
        )

    def grouped(self, rows: float, n: float, k: float, groups: float, width: int) -> float:
        """Seconds of `rows` rows, each times one of `groups` matrices [k, n]."""
        if not rows * n * k:
            return 0.0
        moved = width * (rows * k + groups * k * n + rows * n)
        return self._bound(2 * rows * n * k, moved, self.cluster.efficiency.grouped, self.dtype)

    def attention(self, flops: float, moved: float, *, backward: bool = False) -> float:
        """Seconds of a fused attention that computes `flops` and moves `moved` bytes."""
        efficiency = self.cluster.efficiency
        # Attention stays in 16 bits where projections are in 8.
        dtype = "bf16" if self.dtype == "fp8" else self.dtype
        return self._bound(flops, moved, efficiency.attention_backward if backward else efficiency.attention, dtype)

    def memory(self, moved: float) -> float:
        """Seconds of reading and writing `moved` bytes in all; 0 where there are none."""
        if not moved:
            return 0.0
        return self.cluster.device.launch + self._memory(moved)

    def _bound(self, flops: float, moved: float, efficiency: float, dtype: str) -> float:
        computing = flops / (self.cluster.peak(dtype) * efficiency)
        return self.cluster.device.launch + max(computing, self._memory(moved))

    def _memory(self, moved: float) -> float:
        return moved / (self.cluster.device.bandwidth * self.cluster.efficiency.memory)
