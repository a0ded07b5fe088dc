"""From a model without memory to this rank's part of it, with weights that do not depend on the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .expert import expert_parameter_names
from .mesh import Mesh

Initialiser = Callable[[str, Tensor, torch.Generator], None]
"""Fills one weight: its full name, the tensor (one expert's slice of an expert weight), a seeded generator."""


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any printable values: equal on every rank, machine and version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def parallelize(model: nn.Module, mesh: Mesh, initialise: Initialiser, seed: int, dtype: torch.dtype) -> nn.Module:
    """Gives a model built on `meta` its memory on this rank, in place, and returns it.

    `model` holds all experts. Expert weights keep this rank's share of the leading dimension. Every weight is
    drawn from a generator seeded by (seed, name, expert), so the model is the same under every layout and no
    rank ever holds more than its part.
    """
    experts = expert_parameter_names(model)
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            shape = list(parameter.shape)
            first = 0
            if full in experts:
                shape[0] //= mesh.expert.size
                first = mesh.expert.rank * shape[0]
            weight = torch.empty(shape, dtype=dtype, device=mesh.device)
            parts = (
                [(f"{full}/{first + i}", weight[i]) for i in range(shape[0])] if full in experts else [(full, weight)]
            )
            for part, tensor in parts:
                generator = torch.Generator(mesh.device).manual_seed(seed_of(seed, part))
                initialise(full, tensor, generator)
            module.register_parameter(name, nn.Parameter(weight, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, torch.zeros_like(buffer, device=mesh.device), persistent=persistent)
    return model
