"""Which part of a stack of matrices this rank holds, and sums over those that hold the rest (METHODS A6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard


@dataclass(frozen=True)
class Shards:
    """Of a parameter [m, n] or [E, m, n]: groups of ranks that hold other rows, columns or matrices of it."""

    rows: tuple[dist.ProcessGroup, ...] = ()
    columns: tuple[dist.ProcessGroup, ...] = ()
    matrices: tuple[dist.ProcessGroup, ...] = ()
    first_row: int = 0
    """Global indices of this rank's first row and column."""
    first_column: int = 0
    exact: bool = True
    """Whether factors are those of whole matrices; else each shard is a matrix of its own."""

    def over_rows(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks with other rows, in place."""
        return _reduce(tensor, self.rows)

    def over_columns(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks with other columns, in place."""
        return _reduce(tensor, self.columns)

    def over_matrix(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks that hold parts of the same matrices, in place."""
        return _reduce(_reduce(tensor, self.rows), self.columns)

    def largest(self, tensor: Tensor) -> Tensor:
        """Maximum over all ranks that hold parts of the parameter, in place."""
        return _reduce(tensor, (*self.rows, *self.columns, *self.matrices), dist.ReduceOp.MAX)

    def largest_of_stack(self, tensor: Tensor) -> Tensor:
        """Maximum over the ranks that hold other matrices of the same stack, in place."""
        return _reduce(tensor, self.matrices, dist.ReduceOp.MAX)


def _reduce(tensor: Tensor, groups: tuple[dist.ProcessGroup, ...], op=dist.ReduceOp.SUM) -> Tensor:
    for group in groups:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


WHOLE = Shards()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_cut(placement: Placement) -> TypeGuard[Shard | _StridedShard]:
    """Whether ranks hold different parts; strided ones are FSDP2's over those of tensor parallelism."""
    return isinstance(placement, Shard | _StridedShard)


def cut_along(placement: Shard | _StridedShard, dim: int) -> Placement:
    """The same cut along another dim."""
    return Shard(dim) if isinstance(placement, Shard) else _StridedShard(dim, split_factor=placement.split_factor)


def align_gradient(parameter: Tensor) -> None:
    """Gives the gradient of a DTensor its placements; what autograd leaves as partial sums is summed."""
    grad = parameter.grad
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)


def as_part(part: Tensor, shape: Sequence[int], parameter: DTensor, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of `shape` over the ranks of `parameter`, of which this one holds `part`."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return DTensor.from_local(
        part, parameter.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def shards_of(parameter: Tensor, exact: bool) -> Shards:
    """How `parameter` is cut up; not `exact`: as if each shard were a matrix of its own.

    Raises ValueError for placements that are neither shards nor replicas.
    """
    if not isinstance(parameter, DTensor):
        return WHOLE
    mesh = parameter.device_mesh
    kinds: dict[int, list[int]] = {}
    for dim, placement in enumerate(parameter.placements):
        if is_cut(placement):
            if mesh.size(dim) > 1:
                kinds.setdefault(placement.dim - parameter.dim(), []).append(dim)
        elif not isinstance(placement, Replicate):
            raise ValueError(f"a parameter {list(parameter.shape)} placed as {placement} cannot be stepped; reduce it")
    if not exact:
        # Ranks are made equal over all shards, as among the matrices of one stack.
        cut = tuple(mesh.get_group(dim) for dims in kinds.values() for dim in dims)
        return Shards(matrices=cut, exact=False)
    rows, columns, matrices = kinds.get(-2, []), kinds.get(-1, []), kinds.get(-3, [])
    if parameter.dim() > 3:
        # No stack: all of it is one matrix.
        rows, matrices = [dim for kind, dims in kinds.items() if kind < -1 for dim in dims], []
    offset = (0, 0, *_offset(parameter))
    return Shards(
        rows=tuple(mesh.get_group(dim) for dim in rows),
        columns=tuple(mesh.get_group(dim) for dim in columns),
        matrices=tuple(mesh.get_group(dim) for dim in matrices),
        first_row=offset[-2],
        first_column=offset[-1],
    )


def _offset(parameter: DTensor) -> tuple[int, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)[1])
