"""From a model without memory to this rank's part of it, with weights that do not depend on the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .expert import expert_parameter_names
from .mesh import Mesh
from .tensor import cut, tensor_parameters

Initialiser = Callable[[str, Tensor, torch.Generator], None]
"""Fills one weight: its full name, the tensor (one expert's slice of an expert weight), a seeded generator."""


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any printable values: equal on every rank, machine and version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def parallelize(
    model: nn.Module,
    mesh: Mesh,
    initialise: Initialiser,
    seed: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Gives a model built on `meta` its memory on this rank, in place, and returns it.

    `model` holds all experts. Expert weights keep this rank's share of the leading dimension, and what tensor ranks
    share becomes a DTensor of its part. Every weight is drawn from a generator seeded by (seed, name, expert), so the
    model is the same under every layout. No rank ever holds more than its part, but for one dense weight at a time,
    and with `parallel.shard` one block more: FSDP2 cuts it when it is filled.

    compute_dtype: what experts compute in, where that is not `dtype`; `parallel.shard` ranks gather them in it.
    """
    experts, dims = expert_parameter_names(model), tensor_parameters(model, mesh)
    filled: set[nn.Module] = set()

    def fill(unit: nn.Module, prefix: str) -> None:
        for name, module in unit.named_modules(prefix=prefix):
            if module not in filled:
                _fill(module, name, experts, dims, mesh, initialise, seed, dtype)
                filled.add(module)

    if mesh.shard.size == 1:
        fill(model, "")
        return model
    # Imported here: FSDP2 takes a second that others need not spend.
    from .shard import shard_unit, units

    for prefix, unit in units(model):
        fill(unit, prefix)
        shard_unit(unit, mesh, compute_dtype)
    return model


def free_gathered(model: nn.Module, mesh: Mesh) -> None:
    """To be called after forward passes that no backward follows: frees the weights that FSDP2 left gathered."""
    if mesh.shard.size > 1:
        from .shard import reshard

        reshard(model)


def _fill(
    module: nn.Module,
    prefix: str,
    experts: frozenset[str],
    dims: Mapping[str, int],
    mesh: Mesh,
    initialise: Initialiser,
    seed: int,
    dtype: torch.dtype,
) -> None:
    """Memory and values for what `module`, called `prefix`, holds itself."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        full = f"{prefix}.{name}" if prefix else name
        shape = list(parameter.shape)
        first = 0
        if full in experts:
            shape[0] //= mesh.expert.size
            first = mesh.expert.rank * shape[0]
        weight = torch.empty(shape, dtype=dtype, device=mesh.device)
        parts = [(f"{full}/{first + i}", weight[i]) for i in range(shape[0])] if full in experts else [(full, weight)]
        for part, tensor in parts:
            generator = torch.Generator(mesh.device).manual_seed(seed_of(seed, part))
            initialise(full, tensor, generator)
        if full in dims:
            weight = cut(weight, dims[full], mesh)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        persistent = name not in module._non_persistent_buffers_set
        module.register_buffer(name, torch.zeros_like(buffer, device=mesh.device), persistent=persistent)
