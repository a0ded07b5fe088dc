"""Room for the factors of a checkpoint: torch.distributed.checkpoint loads into tensors of the shapes it saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .shards import as_part, local

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["make_room"]


def make_room(state_dict: dict[str, Any], metadata: Metadata) -> None:
    """Replaces factors in `state_dict` by empty ones with as many columns as the checkpoint has.

        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        make_room(state, FileSystemReader(path).read_metadata())
        torch.distributed.checkpoint.load(state, checkpoint_id=path)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    The optimizer may be new or have stepped; the number of ranks may be another than the one that saved.

    Args:
        state_dict: nested as it is to be loaded, with Adapprox's state somewhere in it.
        metadata: of the checkpoint.
    """
    _make_room(state_dict, metadata, "")


def _make_room(state_dict: dict[str, Any], metadata: Metadata, prefix: str) -> None:
    for key, value in state_dict.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _make_room(value, metadata, f"{name}.")
        elif isinstance(value, Tensor) and name.endswith((".Q", ".U")):
            shape = getattr(metadata.state_dict_metadata.get(name), "size", value.shape)
            # Other differences are for the loading to report.
            if shape != value.shape and shape[:-1] == value.shape[:-1]:
                state_dict[key] = _resized(value, shape)


def _resized(factor: Tensor, shape: torch.Size) -> Tensor:
    part = local(factor)
    part = part.new_zeros(*part.shape[:-1], shape[-1])
    return as_part(part, shape, factor, factor.placements) if isinstance(factor, DTensor) else part
