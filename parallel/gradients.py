"""Gradient reduction over the right ranks, overlapped with backward; the global norm and clipping.

Losses are written as sums over local tokens divided by global counts, so gradients are *summed*: dense ones
over all ranks, expert ones over the ranks that hold the same experts (tokens of the others came by all-to-all).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .collectives import all_reduce
from .expert import expert_parameter_names
from .mesh import Axis, Mesh
from .stopwatch import Stopwatch


class _Bucket:
    """Parameters whose gradients are views of one flat buffer, reduced in one collective."""

    def __init__(self, parameters: list[nn.Parameter], axis: Axis, name: str) -> None:
        self.parameters, self.axis, self.name = parameters, axis, name
        self.flat = torch.zeros(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self.views: list[Tensor] = []
        start = 0
        for p in parameters:
            self.views.append(self.flat[start : start + p.numel()].view_as(p))
            start += p.numel()
        self.missing = len(parameters)
        self.work: dist.Work | None = None

    def attach(self) -> None:
        for p, view in zip(self.parameters, self.views, strict=True):
            p.grad = view


class Gradients:
    """Owns the gradients of a model: zeroes, reduces, measures and clips them.

    Buckets are reduced in one fixed order, each as soon as all its gradients are there, so that ranks can never
    disagree about which collective comes next, whatever order their hooks fire in.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, bucket_bytes: int = 25 * 2**20) -> None:
        self.mesh = mesh
        experts = expert_parameter_names(model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        dense = _buckets([p for n, p in named if n not in experts], mesh.stage, "dense-gradients", bucket_bytes)
        local = _buckets([p for n, p in named if n in experts], mesh.expert_data, "expert-gradients", bucket_bytes)
        self.dense, self.experts = dense, local
        # Gradients of late layers come first: the order in which buckets complete.
        position = {id(p): i for i, (_, p) in enumerate(named)}
        self._order = sorted(dense + local, key=lambda b: -max(position[id(p)] for p in b.parameters))
        self._next = 0
        self._reducing = False
        for number, bucket in enumerate(self._order):
            bucket.attach()
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(self._hook(number))

    def _hook(self, number: int):
        # Weak: what a parameter's hook holds is out of the collector's sight, and this holds the parameter.
        weak = weakref.ref(self)

        def ready(_: Tensor) -> None:
            gradients = weak()
            if gradients is not None and gradients._reducing:
                gradients._order[number].missing -= 1
                gradients._launch(complete_only=True)

        return ready

    def _launch(self, complete_only: bool) -> None:
        while self._next < len(self._order):
            bucket = self._order[self._next]
            if complete_only and bucket.missing > 0:
                return
            self._next += 1
            if bucket.axis.group is not None:
                num_bytes = bucket.flat.numel() * bucket.flat.element_size()
                self.mesh.recorder.collective_entered(bucket.name, num_bytes)
                bucket.work = dist.all_reduce(bucket.flat, group=bucket.axis.group, async_op=True)

    def zero(self) -> None:
        """Zeroes all gradients; call before the first micro-batch of a step."""
        for bucket in self._order:
            bucket.flat.zero_()
            bucket.attach()

    @contextmanager
    def reduced(self) -> Iterator[None]:
        """Backward passes inside are the step's last: gradients are summed over ranks when it ends."""
        self._next = 0
        for bucket in self._order:
            bucket.missing = len(bucket.parameters)
        self._reducing = True
        try:
            yield
            self._launch(complete_only=False)  # also buckets that some parameter never reached
            for bucket in self._order:
                if bucket.work is not None:
                    watch = Stopwatch(bucket.flat.device)
                    bucket.work.wait()
                    bucket.work = None
                    self.mesh.recorder.collective_left(bucket.name, watch.stop())
        finally:
            self._reducing = False

    def norm(self) -> Tensor:
        """Global 2-norm over all ranks' parameters, each counted once; fp64, the same on every rank."""
        dense = _squares((b.flat for b in self.dense), self.mesh.device)
        local = _squares((b.flat for b in self.experts), self.mesh.device)
        if self.experts:
            all_reduce(local, self.mesh.expert, "gradient-norm", self.mesh.recorder)
        return (dense + local).sqrt()

    def scale(self, factor: Tensor | float) -> None:
        """Multiplies every gradient by `factor`."""
        for bucket in self._order:
            bucket.flat.mul_(factor)

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scales gradients of global norm `norm` down to `limit`."""
        self.scale((limit / (norm + 1e-6)).clamp(max=1.0).to(torch.float32))


def _squares(flats: Iterable[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for flat in flats:
        # Squared in fp64 only here: asking the norm itself for fp64 would copy the whole buffer.
        total = total + torch.linalg.vector_norm(flat).double().square()
    return total


def _buckets(parameters: list[nn.Parameter], axis: Axis, name: str, limit: int) -> list[_Bucket]:
    """Consecutive parameters of one dtype together, up to `limit` bytes (a larger one stands alone)."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for p in reversed(parameters):
        num_bytes = p.numel() * p.element_size()
        if not groups or size + num_bytes > limit or groups[-1][0].dtype != p.dtype:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += num_bytes
    return [_Bucket(group, axis, name) for group in groups]
