"""FSDP2 over a model: each rank stores a part of every weight, and a block's weights are gathered while it computes.

Dense weights [m, ...] are cut along m over `shard`, experts [e, d, f] along d over `expert_shard`: a rank often holds
fewer experts than share their storage. Both have copies over `data`. Gradients are sums in this code base, and FSDP2
is told so. What is not here: experts whose storage no other rank shares stay whole (gradients.py reduces them).

Parts are master weights in the model's dtype. Experts, which compute in a narrower one under autocast, are gathered in
it, for half the bytes and the same numbers (but where stand-ins use them a second time: the two gradients meet in that
dtype). Blocks are not, for their norms and routers compute in fp32. Gradients are reduced in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from .collectives import all_gather_single, all_reduce, reduce_scatter_single
from .events import Recorder
from .expert import EXPERT_PARAMETERS, HOLD
from .mesh import Axis, Mesh
from .stages import RUN
from .stopwatch import Stopwatch

_EXPERT_DIM = 1


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What is gathered at once, by name, inner ones first: a block's experts, the block, in the end what is left."""
    for prefix, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList):
            for name, block in modules.named_children():
                full = f"{prefix}.{name}" if prefix else name
                yield from (found for found in block.named_modules(prefix=full) if hasattr(found[1], EXPERT_PARAMETERS))
                yield full, block
    yield "", model


def shard_unit(unit: nn.Module, mesh: Mesh, compute_dtype: torch.dtype | None = None) -> None:
    """Leaves this rank its part of the weights of `unit`, those aside that belong to units within.

    compute_dtype: what experts compute in and are gathered in; None: their own. Gradients are summed in their own.

    Raises ValueError where experts do not split evenly.
    """
    if hasattr(unit, EXPERT_PARAMETERS):
        if mesh.expert_shard.size > 1:
            assert mesh.expert_mesh is not None
            _check_even(unit, mesh.expert_shard)
            _shard(
                unit, mesh.expert_mesh["expert_shard"], mesh.expert_shard, mesh, "expert", _EXPERT_DIM, compute_dtype
            )
            if hasattr(unit, HOLD):
                register_fsdp_forward_method(unit, HOLD)
        return
    assert mesh.dense_mesh is not None
    # FSDP2 looks for tensors in all that a module returns, and gathers the module's weights when one of them has its
    # gradient. The losses of a routing have theirs before backward comes to the first block: it would gather all.
    unit.register_forward_hook(_hide)
    _shard(unit, mesh.dense_mesh["shard"], mesh.shard, mesh, "dense", 0)
    unit.register_forward_hook(_show)
    if mesh.pipeline.size > 1 and hasattr(unit, RUN):
        _gather_in_stages(unit)


def _gather_in_stages(model: nn.Module) -> None:
    """In a pipeline `RUN` is what is called with gradients: FSDP2 gets the hooks there that it has around `forward`."""
    run = getattr(model, RUN)
    setattr(model, RUN, lambda *args: _hide(model, args, run(*args)))
    register_fsdp_forward_method(model, RUN)
    gathering = getattr(model, RUN)
    setattr(model, RUN, lambda *args: _show(model, args, gathering(*args)))
    # The loss reads the output layer outside, for micro-batches that are on their way together.
    cast(FSDPModule, model).set_reshard_after_backward(False, recurse=False)


def _check_even(unit: nn.Module, axis: Axis) -> None:
    for name in getattr(unit, EXPERT_PARAMETERS):
        width = getattr(unit, name).size(_EXPERT_DIM)
        if width % axis.size:
            raise ValueError(f"shard: experts of {width} rows ({name}) do not split over {axis.size} ranks")


def _shard(
    unit: nn.Module,
    device_mesh: Any,
    axis: Axis,
    mesh: Mesh,
    name: str,
    dim: int,
    compute_dtype: torch.dtype | None = None,
) -> None:
    # The experts of inner units: units of their own, or whole.
    inner = [module for module in unit.modules() if module is not unit and hasattr(module, EXPERT_PARAMETERS)]
    fully_shard(
        unit,
        mesh=device_mesh,
        shard_placement_fn=lambda _: Shard(dim),
        mp_policy=MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=next(unit.parameters()).dtype, cast_forward_inputs=False
        ),
        ignored_params={p for module in inner for p in module.parameters(recurse=False)},
    )
    sharded = cast(FSDPModule, unit)
    # Sums, also where a back end has no other reduction.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    recorder = mesh.recorder
    sharded.set_custom_all_gather(cast(Any, _AllGather(f"{name}-weights", axis, recorder)))
    sharded.set_custom_reduce_scatter(cast(Any, _ReduceScatter(f"{name}-gradients", axis, recorder)))
    if mesh.data.group is not None:
        # FSDP2 could do this itself, unheard by the recorder.
        sharded.set_all_reduce_hook(partial(_sum_copies, axis=mesh.data, name=f"{name}-gradients", recorder=recorder))


def _sum_copies(gradients: Tensor, axis: Axis, name: str, recorder: Recorder) -> None:
    recorder.collective_entered(name, gradients.numel() * gradients.element_size())
    watch = Stopwatch(gradients.device)
    dist.all_reduce(gradients, group=axis.group)
    recorder.collective_left(name, _waited(watch, gradients))


class _Hidden:
    """Something in which FSDP2 looks for no tensors."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _hide(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(part if isinstance(part, Tensor) else _Hidden(part) for part in output)
    return output if isinstance(output, Tensor) else _Hidden(output)


def _show(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(part.value if isinstance(part, _Hidden) else part for part in output)
    return output.value if isinstance(output, _Hidden) else output


class _Announced:
    """A collective of FSDP2 that the recorder hears of. Buffers are new ones, as FSDP2's own are."""

    def __init__(self, name: str, axis: Axis, recorder: Recorder) -> None:
        self.name, self.axis, self.recorder = name, axis, recorder

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Announced):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        away = input_tensor.numel() * input_tensor.element_size() * (self.axis.size - 1)
        self.recorder.collective_entered(self.name, away)
        watch = Stopwatch(input_tensor.device)
        work = all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        self.recorder.collective_left(self.name, _waited(watch, input_tensor))
        return work


class _ReduceScatter(_Announced):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        away = output_tensor.numel() * output_tensor.element_size() * (self.axis.size - 1)
        self.recorder.collective_entered(self.name, away)
        watch = Stopwatch(input_tensor.device)
        work = reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        self.recorder.collective_left(self.name, _waited(watch, input_tensor))
        return work


def _waited(watch: Stopwatch, tensor: Tensor) -> Any:
    """On CUDA nothing: FSDP2 runs collectives on streams beside the computing, and waits where nobody can listen."""
    return 0.0 if tensor.device.type == "cuda" else watch.stop()


def reshard(model: nn.Module) -> None:
    """Frees what a forward pass without a backward left gathered: the weights outside the blocks.

    They would be out of date once an optimizer has stepped, and hide this rank's part from whoever saves it.
    """
    for module in _sharded_modules(model):
        module.reshard()


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP2 stores a part of `parameter` on each of several ranks."""
    if not isinstance(parameter, DTensor):
        return False
    return not {"shard", "expert_shard"}.isdisjoint(parameter.device_mesh.mesh_dim_names or ())


def _root(model: nn.Module) -> FSDPModule:
    assert isinstance(model, FSDPModule)
    return model


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class Squares(NamedTuple):
    """Sums of squares, fp64, of gradients that are counted over different ranks."""

    dense: Tensor
    """Of weights that tensor ranks have alike."""
    tensor: Tensor
    """Of those that they share."""
    experts: Tensor
    """Of this rank's experts."""


class ShardedGradients:
    """The gradients that FSDP2 owns: DTensors that appear when backward has reduced them."""

    def __init__(self, model: nn.Module, dense: list[nn.Parameter], experts: list[nn.Parameter], mesh: Mesh) -> None:
        self.dense = [p for p in dense if not _is_cut(p)]
        self.tensor = [p for p in dense if _is_cut(p)]
        self.experts, self.mesh = experts, mesh
        self._model, self._modules = model, _sharded_modules(model)
        self._is_pipelined = mesh.pipeline.size > 1

    def zero(self) -> None:
        """Forgets the gradients; those that follow are kept unreduced, until `reduce`."""
        for parameter in (*self.dense, *self.tensor, *self.experts):
            parameter.grad = None
        self._reduce(False)
        if self._is_pipelined:
            _root(self._model).set_is_last_backward(False)

    def reduce(self) -> None:
        """The next backward is the step's last: it reduces; in a pipeline, whose stages end at different times,
        `complete` does."""
        if not self._is_pipelined:
            self._reduce(True)

    def _reduce(self, now: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(now, recurse=False)

    def _reduce_after_all(self) -> None:
        """As torch's pipelining does where its stages are FSDP2's modules."""
        self._reduce(True)
        root = _root(self._model)
        root.set_is_last_backward(True)
        state = cast(Any, fully_shard).state(root)
        for each in state._state_ctx.all_states:
            for group in each._fsdp_param_groups:
                group.post_backward()
        state._root_post_backward_final_callback()
        root.reshard()

    def complete(self) -> None:
        """Zeros where no rank's backward came, as other parameters have them."""
        if self._is_pipelined:
            self._reduce_after_all()
        for parameter in (*self.dense, *self.tensor, *self.experts):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.mesh.tensor.group is not None and self.dense:
            # FSDP2 sums over shards and copies only, and tensor ranks saw other tokens.
            parts = list(_parts(self.dense))
            flat = torch.cat([part.flatten() for part in parts])
            all_reduce(flat, self.mesh.tensor, "dense-gradients", self.mesh.recorder)
            for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))

    def squares(self, of: Any) -> Squares:
        """Sums of squares by `of`, over the ranks that share storage."""
        found = Squares(*(of(_parts(own)) for own in (self.dense, self.tensor, self.experts)))
        for own in found[:2]:
            all_reduce(own, self.mesh.shard, "gradient-norm", self.mesh.recorder)
        if self.experts:
            all_reduce(found.experts, self.mesh.expert_shard, "gradient-norm", self.mesh.recorder)
        return found

    def scale(self, factor: Tensor | float, by: Any) -> None:
        """Multiplies every gradient by `factor`, by `by`."""
        by(list(_parts((*self.dense, *self.tensor, *self.experts))), factor)


def _is_cut(parameter: Tensor) -> bool:
    """Whether tensor ranks share it."""
    return isinstance(parameter, DTensor) and "tensor" in (parameter.device_mesh.mesh_dim_names or ())


def _parts(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """This rank's part of each gradient."""
    return (cast(DTensor, parameter.grad).to_local() for parameter in parameters)
