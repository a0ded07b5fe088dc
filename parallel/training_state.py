"""A model and its optimizer as one flat dict of named tensors: what a checkpoint saves and loads.

Names are `model.<parameter or persistent buffer>` and `optimizer.<parameter>.<key of its state>`: by name, not by
index, so state survives a change of order. Any optimizer whose state is tensors and numbers fits: on loading, its
state is laid out from what the checkpoint lists, not from what the optimizer would create. A number is saved as a
0-d tensor under `<key>#number`; anything else as the optimizer itself says (`Unwrapping`), under `<key>#<part>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate

from .checkpoint import load
from .chunks import expert_dtensor
from .manifest import TensorEntry, read_manifest
from .mesh import Mesh

__all__ = ["Placing", "Unwrapping", "load_training_state", "training_state"]

_MODEL, _OPTIMIZER = "model.", "optimizer."
_PART, _NUMBER = "#", "number"
_NUMBER_TYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


@runtime_checkable
class Unwrapping(Protocol):
    """An optimizer that keeps more than plain tensors and numbers, and knows what of it to save."""

    def unwrap(self, parameter: Tensor, key: str, value: Any, /) -> dict[str, Tensor]:
        """The plain tensors that `value`, state of `parameter` under `key`, is made of; none where it follows."""
        ...

    def wrap(self, parameter: Tensor, key: str, parts: Mapping[str, Tensor], /) -> Any:
        """The value that `unwrap` gave `parts` (at least one) of."""
        ...


@runtime_checkable
class Placing(Protocol):
    """An optimizer that keeps state of a DTensor in other shapes than its own, and knows how it lies over ranks."""

    def placements(self, parameter: DTensor, key: str, /) -> Sequence[Placement]:
        """Of the state of `parameter` under `key`."""
        ...


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, mesh: Mesh, is_expert: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Names every parameter, persistent buffer and optimizer state tensor; all share memory with the originals.

    is_expert: whether the parameter or buffer of this name holds this rank's experts only ([e, ...] of [E, ...]).
    Of an expert parameter's optimizer state, what has its first dim e is sharded as it is; a scalar (a step) must be
    the same on all ranks. A parameter known by several names (tied weights) appears once.

    Raises ValueError where optimizer state is neither tensors nor numbers, belongs to a parameter that the model
    lacks, or is one tensor for experts that ranks share.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in _model_tensors(model):
        local = tensor.detach()
        tensors[_MODEL + name] = expert_dtensor(local, mesh) if is_expert(name) else local
    if optimizer is None:
        return tensors
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in optimizer.state:
        if parameter not in names:
            raise ValueError(f"the optimizer holds state of a parameter {list(parameter.shape)} that the model lacks")
        name = names[parameter]
        for key, value in _plain_tensors(optimizer, parameter, name):
            sharded = is_expert(name) and value.shape[:1] == parameter.shape[:1]
            if is_expert(name) and value.dim() > 0 and not sharded and mesh.expert.size > 1:
                raise ValueError(
                    f"optimizer state {key!r} of {name} is {list(value.shape)} for {len(parameter)} experts, which "
                    f"cannot be shared by {mesh.expert.size} ranks; use parallel.expert: 1, or optimizer.name: adamw"
                )
            tensors[f"{_OPTIMIZER}{name}.{key}"] = expert_dtensor(value, mesh) if sharded else value
    return tensors


def load_training_state(
    path: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    mesh: Mesh,
    is_expert: Callable[[str], bool],
) -> dict[str, Any]:
    """Loads the checkpoint at `path` into the model and the optimizer, stepped before or not; returns its `meta`.

    Without an optimizer only the model is loaded. Hyperparameters (learning rate, decay) stay the optimizer's.
    All ranks of `mesh` call this together. Raises what `load` raises; unless a file failed while it was read,
    nothing has changed then.
    """
    if optimizer is None:
        return load(path, training_state(model, None, mesh, is_expert), mesh, prefix=_MODEL)
    before = dict(optimizer.state)
    try:
        _lay_out(optimizer, model, _entries(path), mesh, is_expert)
        meta = load(path, training_state(model, optimizer, mesh, is_expert), mesh)
        _assemble(optimizer)
        return meta
    except Exception:
        optimizer.state.clear()
        optimizer.state.update(before)
        raise


def _entries(path: Path | str) -> Mapping[str, TensorEntry]:
    try:
        return read_manifest(Path(path)).tensors
    except ValueError:
        # `load` will say so, on every rank.
        return {}


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    persistent = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def _plain_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    """Keys and plain tensors of the state of `parameter`, which is called `name`."""
    for key, value in optimizer.state[parameter].items():
        # What an optimizer has not created yet is no state (SGD without momentum).
        if value is None:
            continue
        if type(value) in (Tensor, nn.Parameter, DTensor):
            parts = {key: value}
        elif type(value) in _NUMBER_TYPES:
            parts = {f"{key}{_PART}{_NUMBER}": torch.tensor(value, dtype=_NUMBER_TYPES[type(value)])}
        elif isinstance(optimizer, Unwrapping):
            unwrapped = optimizer.unwrap(parameter, key, value)
            parts = {f"{key}{_PART}{part}": tensor for part, tensor in unwrapped.items()}
        else:
            raise ValueError(
                f"optimizer state {key!r} of {name} is a {type(value).__name__}; a checkpoint holds tensors and numbers"
            )
        if "." in key:
            raise ValueError(f"optimizer state {key!r} of {name}: a checkpoint holds keys without dots")
        yield from parts.items()


def _assemble(optimizer: torch.optim.Optimizer) -> None:
    """Turns what `_lay_out` made of numbers and of parts back into them."""
    for parameter, state in optimizer.state.items():
        parts: dict[str, dict[str, Tensor]] = {}
        for full_key in [key for key in state if _PART in key]:
            key, _, part = full_key.partition(_PART)
            parts.setdefault(key, {})[part] = state.pop(full_key)
        for key, tensors in parts.items():
            if tensors.keys() == {_NUMBER}:
                state[key] = tensors[_NUMBER].item()
            else:
                assert isinstance(optimizer, Unwrapping)
                state[key] = optimizer.wrap(parameter, key, tensors)


def _lay_out(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    entries: Mapping[str, TensorEntry],
    mesh: Mesh,
    is_expert: Callable[[str], bool],
) -> None:
    """Gives `optimizer` uninitialised state of the names, dtypes and local shapes that `entries` list.

    Numbers and parts stay tensors under their full keys. Raises ValueError for parts that `optimizer` cannot wrap.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    parameters, state = dict(model.named_parameters()), optimizer.state
    state.clear()
    for full_name, entry in entries.items():
        name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition(".")
        parameter = parameters.get(name)
        # Left out here, the names that do not fit are reported by `load` all together.
        if not full_name.startswith(_OPTIMIZER) or parameter is None or parameter not in groups:
            continue
        _, _, part = key.partition(_PART)
        if part not in ("", _NUMBER) and not isinstance(optimizer, Unwrapping):
            raise ValueError(
                f"the checkpoint has {full_name}, which {type(optimizer).__name__} does not know; use the optimizer "
                "that it was saved with"
            )
        shape = entry.shape
        if is_expert(name) and shape and shape[0] == parameter.shape[0] * mesh.expert.size:
            shape = (parameter.shape[0], *shape[1:])
        # torch's optimizers count steps on the CPU unless their kernel reads the count.
        group = groups[parameter]
        counts = key == "step" or part == _NUMBER
        on_host = counts and not entry.shape and not (group.get("capturable") or group.get("fused"))
        device = torch.device("cpu") if on_host else parameter.device
        if isinstance(parameter, DTensor) and shape and not counts:
            placements = _placements(optimizer, parameter, key, shape)
            state[parameter][key] = _zeros_over_ranks(shape, entry.dtype, parameter, placements)
        else:
            state[parameter][key] = torch.zeros(shape, dtype=entry.dtype, device=device)


def _placements(
    optimizer: torch.optim.Optimizer, parameter: DTensor, key: str, shape: Sequence[int]
) -> Sequence[Placement]:
    if isinstance(optimizer, Placing):
        return optimizer.placements(parameter, key)
    same = tuple(shape) == tuple(parameter.shape)
    return parameter.placements if same else [Replicate()] * parameter.device_mesh.ndim


def _zeros_over_ranks(
    shape: Sequence[int], dtype: torch.dtype, parameter: DTensor, placements: Sequence[Placement]
) -> DTensor:
    """A DTensor of `shape` over the ranks of `parameter`."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, _ = compute_local_shape_and_global_offset(torch.Size(shape), parameter.device_mesh, placements)
    part = torch.zeros(local, dtype=dtype, device=parameter.device)
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        part, parameter.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )
