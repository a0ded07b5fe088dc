"""Tensor parallelism with sequence parallelism: which weights are cut, and where activations travel.

Between layers every rank of `mesh.tensor` keeps its part of each sequence. A dense layer gathers the sequence, computes
its rows of the first matrices (heads, hidden units) and the matching columns of the last one, and the sums of all ranks
come back cut along the sequence; backward gathers it again instead of keeping it (Megatron-LM, arXiv 2205.05198,
section 4.2.2). To an MoE layer the ranks are ranks with other tokens. Modules name what is cut (`TENSOR_PARAMETERS`);
such a parameter is a DTensor, so that checkpoints and optimizers see whose part it is. Forward reads its `local` part.

Not here: embedding, output layer and loss (vocabulary.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import all_reduce, scatter, start_gather, start_scatter
from .events import Recorder
from .mesh import Axis, Mesh
from .recompute import Windows, no_window

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TENSOR_PARAMETERS = "tensor_parameters"
"""Name of the attribute by which a module lists the parameters, its own or its children's, that tensor ranks share,
each with the dim that is cut: `{"q.weight": 0, "out.weight": 1}`."""


def tensor_parameters(model: nn.Module, mesh: Mesh) -> dict[str, int]:
    """Full names of the parameters that tensor ranks share, with the dim that is cut; none where there is one rank."""
    if mesh.tensor.size == 1:
        return {}
    there = {name for name, _ in model.named_parameters()}
    listed = {
        f"{prefix}.{name}" if prefix else name: dim
        for prefix, module in model.named_modules()
        for name, dim in getattr(module, TENSOR_PARAMETERS, {}).items()
    }
    return {name: dim for name, dim in listed.items() if name in there}


def part_of(size: int, axis: Axis) -> range:
    """What this rank holds of `size` indices: consecutive ones, on the last ranks fewer where they do not divide.

    Raises ValueError where a rank would hold none.
    """
    each = -(-size // axis.size)
    if each * (axis.size - 1) >= size:
        raise ValueError(f"tensor: {size} rows leave nothing for some of {axis.size} ranks; use fewer")
    return range(axis.rank * each, min(size, (axis.rank + 1) * each))


def cut(whole: Tensor, dim: int, mesh: Mesh) -> DTensor:
    """This rank's part of `whole` along `dim`, as a DTensor over the tensor ranks with memory of its own."""
    # Here: importing it takes longer than the rest of a model, and one rank has no use for it.
    from torch.distributed.tensor import DTensor, Shard

    assert mesh.dense_mesh is not None
    own = part_of(whole.size(dim), mesh.tensor)
    part = whole.narrow(dim, own.start, len(own)).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        part, mesh.dense_mesh["tensor"], [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter, differentiable; the parameter itself where it is not cut."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def placed_as(parameter: Tensor, part: Tensor) -> DTensor:
    """`part`, in its memory, as this rank's part of a tensor that lies over the ranks as the DTensor `parameter`."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


class _GatherAndProject(torch.autograd.Function):
    """Products of all ranks' tokens with weights, of which only this rank's tokens are kept for backward.

    Backward gathers them again while it forms the gradient of the tokens, and sums that over ranks while it forms
    those of the weights.
    """

    @staticmethod
    def forward(ctx, x, axis, recorder, during, *weights):
        ctx.axis, ctx.recorder, ctx.during = axis, recorder, during
        ctx.save_for_backward(x, *weights)
        whole = start_gather(x, x.dim() - 2, axis, "tensor-gather", recorder).land(during[0])
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads):
        (x, *weights), axis, recorder = ctx.saved_tensors, ctx.axis, ctx.recorder
        dim = x.dim() - 2
        again = start_gather(x, dim, axis, "tensor-gather-again", recorder)
        grad_whole = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_whole += grad @ weight
        sums = start_scatter(grad_whole, dim, axis, "tensor-gather-gradient", recorder)
        whole_TD = again.land(ctx.during[1]).flatten(0, -2)
        grad_weights = [grad.flatten(0, -2).t() @ whole_TD for grad in grads]
        return sums.land(ctx.during[2]), None, None, None, *grad_weights


class Stream(Protocol):
    """How a layer that tensor ranks compute together reads the residual stream, and writes to it."""

    travels: ClassVar[bool]
    """Whether `project` and `leave` exchange with other ranks."""

    def project(self, x: Tensor, *weights: Tensor, part: str = "", windows: Windows = no_window) -> Sequence[Tensor]:
        """All tokens of the tensor ranks times this rank's rows of each weight: x [..., n, D] -> [..., all, rows].

        `windows` of the `part` of a layer are those of what it exchanges.
        """
        ...

    def leave(self, y: Tensor, part: str = "", windows: Windows = no_window) -> Tensor:
        """Sum of all ranks' `y` [..., all, D], for this rank's tokens [..., n, D]."""
        ...


class Alone:
    """One rank: nothing travels."""

    travels: ClassVar = False

    def project(self, x: Tensor, *weights: Tensor, part: str = "", windows: Windows = no_window) -> Sequence[Tensor]:
        """Plain products; under autocast in its dtype."""
        x = compute_dtype(x)
        return [F.linear(x, weight) for weight in weights]

    def leave(self, y: Tensor, part: str = "", windows: Windows = no_window) -> Tensor:
        """As it is."""
        return y


ALONE: Stream = Alone()


class CutSequence:
    """Every rank holds its part of the tokens, of one length: training and evaluation."""

    travels: ClassVar = True

    def __init__(self, axis: Axis, recorder: Recorder) -> None:
        self.axis, self.recorder = axis, recorder

    def project(self, x: Tensor, *weights: Tensor, part: str = "", windows: Windows = no_window) -> Sequence[Tensor]:
        """Gathers along the tokens first; under autocast in its dtype, as the products want them."""
        x = compute_dtype(x)
        rows = [weight.to(x.dtype) for weight in weights]
        name = f"{part} gather"
        during = windows(name, forward=True), windows(f"{name} again"), windows(f"{name} gradient")
        return _GatherAndProject.apply(x, self.axis, self.recorder, during, *rows)  # pyright: ignore[reportReturnType]

    def leave(self, y: Tensor, part: str = "", windows: Windows = no_window) -> Tensor:
        """Reduce-scatter along the tokens."""
        name = f"{part} reduce-scatter"
        during = windows(name, forward=True), windows(f"{name} gradient")
        return scatter(y, y.dim() - 2, self.axis, "tensor-scatter", self.recorder, during)


class WholeSequence:
    """Every rank holds all tokens: generation, one token at a time. Without gradients."""

    travels: ClassVar = True

    def __init__(self, axis: Axis, recorder: Recorder) -> None:
        self.axis, self.recorder = axis, recorder

    def project(self, x: Tensor, *weights: Tensor, part: str = "", windows: Windows = no_window) -> Sequence[Tensor]:
        """Plain products."""
        return [F.linear(x, weight) for weight in weights]

    def leave(self, y: Tensor, part: str = "", windows: Windows = no_window) -> Tensor:
        """All-reduce."""
        assert not torch.is_grad_enabled(), "ranks with the same tokens would count their gradients several times"
        return all_reduce(y.contiguous(), self.axis, "tensor-sum", self.recorder)


def streams(mesh: Mesh) -> tuple[Stream, Stream]:
    """For tokens that the tensor ranks share, and for tokens that all of them hold."""
    if mesh.tensor.group is None:
        return ALONE, ALONE
    return CutSequence(mesh.tensor, mesh.recorder), WholeSequence(mesh.tensor, mesh.recorder)


def compute_dtype(x: Tensor) -> Tensor:
    """Under autocast in its dtype, as nn.Linear's inputs would be: half the bytes to send and to keep."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
