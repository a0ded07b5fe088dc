"""Gradient reduction over the right ranks, overlapped with backward; the global norm and clipping.

Losses are written as sums over local tokens divided by global counts, so gradients are *summed*: dense ones
over all ranks of the stage, those of weights that tensor ranks share over the ranks that read other sequences (each saw
all tokens of its own), expert ones over the ranks that hold the same experts (tokens of the others came by all-to-all).
Parameters whose storage ranks share (shard.py) are reduced by FSDP2; here they are zeroed, measured and clipped.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.fused import fused_clip
from .collectives import all_reduce
from .expert import expert_parameter_names
from .mesh import Axis, Mesh
from .stopwatch import Stopwatch, Underway
from .tensor import local, placed_as, tensor_parameters

if TYPE_CHECKING:
    from .shard import ShardedGradients


class Summing(Protocol):
    """What a step needs of whoever sums gradients over ranks: `Gradients`, or an engine."""

    def zero(self) -> None:
        """Before the first micro-batch of a step."""
        ...

    def reduced(self) -> AbstractContextManager[None]:
        """Around the last micro-batch of a step: gradients are sums over ranks when it ends."""
        ...

    def norm(self) -> Tensor:
        """Global 2-norm, every parameter counted once; fp64, the same on every rank."""
        ...

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scales gradients of global norm `norm` down to `limit`."""
        ...


class _Bucket:
    """Parameters whose gradients are views of one flat buffer, reduced in one collective."""

    def __init__(self, parameters: list[nn.Parameter], axis: Axis, name: str) -> None:
        self.parameters, self.axis, self.name = parameters, axis, name
        parts = [local(p) for p in parameters]
        self.flat = torch.zeros(
            sum(part.numel() for part in parts), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self.views: list[Tensor] = []
        start = 0
        for p, part in zip(parameters, parts, strict=True):
            view = self.flat[start : start + part.numel()].view_as(part)
            self.views.append(view if part is p else placed_as(p, view))
            start += part.numel()
        self.missing = len(parameters)
        self.work: dist.Work | None = None
        self.underway: Underway | None = None

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
        experts, cut = expert_parameter_names(model), tensor_parameters(model, mesh)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.sharded: ShardedGradients | None = None
        if mesh.shard.size > 1:
            named = self._leave_to_fsdp(model, named, experts)
        whole = [p for n, p in named if n not in experts and n not in cut]
        self.dense = _buckets(whole, mesh.stage, "dense-gradients", bucket_bytes)
        self.tensor = _buckets([p for n, p in named if n in cut], mesh.batch, "tensor-gradients", bucket_bytes)
        self.experts = _buckets(
            [p for n, p in named if n in experts], mesh.expert_data, "expert-gradients", bucket_bytes
        )
        # Gradients of late layers come first: the order in which buckets complete.
        position = {id(p): i for i, (_, p) in enumerate(named)}
        self._order = sorted(
            self.dense + self.tensor + self.experts, key=lambda b: -max(position[id(p)] for p in b.parameters)
        )
        self._next = 0
        self._reducing = False
        for number, bucket in enumerate(self._order):
            bucket.attach()
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(self._hook(number))

    def _leave_to_fsdp(
        self, model: nn.Module, named: list[tuple[str, nn.Parameter]], experts: frozenset[str]
    ) -> list[tuple[str, nn.Parameter]]:
        """Those of `named` that FSDP2 does not reduce."""
        # Imported here: FSDP2 takes a second that others need not spend.
        from .shard import ShardedGradients, is_sharded

        shared = [(n, p) for n, p in named if is_sharded(p)]
        dense, local = [p for n, p in shared if n not in experts], [p for n, p in shared if n in experts]
        self.sharded = ShardedGradients(model, dense, local, self.mesh)
        return [(n, p) for n, p in named if not is_sharded(p)]

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
                bucket.underway = Underway([bucket.work], bucket.flat.device)

    def zero(self) -> None:
        """Zeroes all gradients; call before the first micro-batch of a step."""
        for bucket in self._order:
            bucket.flat.zero_()
            bucket.attach()
        if self.sharded is not None:
            self.sharded.zero()

    @contextmanager
    def reduced(self) -> Iterator[None]:
        """Backward passes inside are the step's last: gradients are summed over ranks when it ends."""
        self._next = 0
        for bucket in self._order:
            bucket.missing = len(bucket.parameters)
        self._reducing = True
        if self.sharded is not None:
            self.sharded.reduce()
        try:
            yield
            self._launch(complete_only=False)  # also buckets that some parameter never reached
            for bucket in self._order:
                if bucket.work is not None and bucket.underway is not None:
                    hidden, watch = bucket.underway.hidden(), Stopwatch(bucket.flat.device)
                    bucket.work.wait()
                    bucket.work = None
                    self.mesh.recorder.collective_left(bucket.name, watch.stop(), hidden)
            if self.sharded is not None:
                self.sharded.complete()
        finally:
            self._reducing = False

    def norm(self) -> Tensor:
        """Global 2-norm over all ranks' parameters, each counted once; fp64, the same on every rank."""
        squares = partial(sum_of_squares, device=self.mesh.device)
        total, tensor, experts = (squares(b.flat for b in own) for own in (self.dense, self.tensor, self.experts))
        has_tensor, has_experts = bool(self.tensor), bool(self.experts)
        if self.sharded is not None:
            shared = self.sharded.squares(squares)
            total, tensor, experts = total + shared.dense, tensor + shared.tensor, experts + shared.experts
            has_tensor |= bool(self.sharded.tensor)
            has_experts |= bool(self.sharded.experts)
        for there, own, axis in ((has_experts, experts, self.mesh.expert), (has_tensor, tensor, self.mesh.tensor)):
            if there:
                total = total + all_reduce(own, axis, "gradient-norm", self.mesh.recorder)
        # Ranks of a pipeline hold different parameters: a model in which two share one is not built.
        return all_reduce(total, self.mesh.pipeline, "gradient-norm", self.mesh.recorder).sqrt()

    def scale(self, factor: Tensor | float) -> None:
        """Multiplies every gradient by `factor`."""
        scale = fused_clip(self.mesh.device).run.scale
        scale([bucket.flat for bucket in self._order], factor)
        if self.sharded is not None:
            self.sharded.scale(factor, scale)

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scales gradients of global norm `norm` down to `limit`."""
        self.scale(clipping(norm, limit))


def clipping(norm: Tensor, limit: float) -> Tensor:
    """What gradients of global norm `norm` are multiplied by to have `limit` at most."""
    return (limit / (norm + 1e-6)).clamp(max=1.0).to(torch.float32)


def sum_of_squares(flats: Iterable[Tensor], device: torch.device) -> Tensor:
    """Of all numbers in `flats`; fp64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for norm in fused_clip(device).run.norms(list(flats)):
        # Squared in fp64 only here: asking the norm itself for fp64 would copy the whole buffer.
        total = total + norm.double().square()
    return total


def _buckets(parameters: list[nn.Parameter], axis: Axis, name: str, limit: int) -> list[_Bucket]:
    """Consecutive parameters of one dtype together, up to `limit` bytes (a larger one stands alone)."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for p in reversed(parameters):
        num_bytes = local(p).numel() * p.element_size()
        if not groups or size + num_bytes > limit or groups[-1][0].dtype != p.dtype:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += num_bytes
    return [_Bucket(group, axis, name) for group in groups]
