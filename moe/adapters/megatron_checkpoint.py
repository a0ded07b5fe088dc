"""Weights of a GPT model from a folder that Megatron-Core's dist_checkpointing saved; imports no Megatron.

Such a folder (`torch_dist`) is one of torch's distributed checkpoints, with a few pickled values beside it:
`common.pt`, where Megatron-LM puts its command line. Neither is trusted: of all that a pickle may name only torch's
descriptions of tensors and plain values become what they say, anything else an inert `Unknown`.

Whatever layout saved it, a tensor is there as a whole. Layers that are alike lie in one tensor with the layers in
front, or each under its number; experts likewise, or each under its number with gate and up apart. Megatron's own MoE
layer with experts one by one, its grouped ones, and ours (megatron_layer.py) all have the same names.
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed.checkpoint does not declare its names as exported.

from __future__ import annotations

import argparse
import collections
import functools
import io
import itertools
import json
import operator
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..decoder import Decoder
from .megatron_names import Link, gpt_links

__all__ = ["MegatronCheckpoint", "Unknown"]

_LATEST = "latest_checkpointed_iteration.txt"

# Megatron keeps the norm before a linear layer with the layer, where a fused one has it.
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


_KNOWN = {
    ("argparse", "Namespace"),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("builtins", name) for name in ("bytearray", "complex", "dict", "frozenset", "list", "set", "slice", "tuple")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
"""What a pickle may name: (module, name)."""


class Unknown:
    """Stands for a pickled object that is not needed here: nothing of it runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        """What a pickled list would do with its items."""

    append = extend

    def __repr__(self) -> str:
        return f"Unknown{self.args!r}"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return Unknown

    def persistent_load(self, pid: Any) -> Unknown:
        """The storage of a tensor: no pickle here is read for one."""
        return Unknown(pid)


class _Reader(dcp.FileSystemReader):
    """torch's, but for the pickle that it trusts, and reads before every tensor."""

    @functools.cached_property
    def _metadata(self) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it holds no description of a checkpoint")
        return metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As torch's, but only once."""
        metadata = self._metadata
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class MegatronCheckpoint:
    """One saved iteration: what it says of its model, and its tensors by name."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of an iteration, or the one above with `latest_checkpointed_iteration.txt`.

        Raises ValueError where that is none, or of another format.
        """
        latest = folder / _LATEST
        try:
            if latest.is_file():
                iteration = latest.read_text(encoding="utf-8").strip()
                folder /= f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
        except (OSError, ValueError) as error:
            raise ValueError(f"{latest}: cannot be read ({_line(error)}); name the folder of an iteration") from error
        self.folder = folder
        described = _read_json(folder / "metadata.json")
        backend = described.get("sharded_backend")
        if backend != "torch_dist":
            raise ValueError(
                f"{folder}: was saved in the format {backend}; save it again with --ckpt-format torch_dist"
            )
        self._reader = _Reader(folder)
        try:
            self._metadata = self._reader.read_metadata()
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(map(operator.index, entry.size))
                for name, entry in self._metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            """Of every tensor, optimizers' included."""
        except Exception as error:  # a broken pickle raises anything
            raise ValueError(f"{folder}: its .metadata cannot be read ({_line(error)}); copy it again") from error

    def args(self) -> dict[str, Any] | None:
        """Megatron-LM's command line, where its training loop saved it; None elsewhere."""
        path = self.folder / "common.pt"
        if not path.is_file():
            return None
        # Not torch.load: whatever it is told, it runs what a TorchScript archive holds.
        try:
            archive = torch._C.PyTorchFileReader(str(path))
            if "constants.pkl" in archive.get_all_records():
                raise pickle.UnpicklingError("it is a TorchScript archive, not saved values")
            common = _Unpickler(io.BytesIO(archive.get_record("data.pkl"))).load()
        except Exception as error:  # a broken pickle raises anything
            raise ValueError(f"{path}: cannot be read ({_line(error)})") from error
        args = common.get("args") if isinstance(common, dict) else None
        return vars(args) if isinstance(args, argparse.Namespace) else None

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """The tensor `name`, on the CPU, in the dtype it was saved in; of one over layers that of one layer."""
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        try:
            planner = _PartPlanner(name, entry, layer)
            dcp.load({name: planner.part}, storage_reader=self._reader, planner=planner, no_dist=True)
        except (CheckpointException, Exception) as error:  # the first is no Exception
            raise ValueError(
                f"{self.folder}: {name} cannot be read; a file of it is missing or cut short: copy it again"
            ) from error
        return planner.part if layer is None else planner.part.squeeze(0)

    def vocabulary(self) -> int:
        """Rows of the embedding: Megatron pads the tokenizer's to a multiple of 128 by default."""
        names, _, _ = self._find("embedding.word_embeddings.weight")
        return self.shapes[names[0]][0]

    @torch.no_grad()
    def load_into(self, model: Decoder) -> None:
        """Copies all weights into `model`, whole and in memory; of the checkpoint one tensor of a layer at a time.

        Raises ValueError naming the first that is missing, of another shape, or that `model` has no place for.
        """
        config, ours = model.config, dict(model.state_dict())
        experts = 0 if config.moe is None else config.moe.experts
        places: dict[str, list[Link]] = collections.defaultdict(list)
        for link in gpt_links(config, range(config.layers), experts, (True, True)):
            places[link.theirs].append(link)
        for layer in config.expert_counts:
            link = Link(f"blocks.{layer}.ffn.router.bias_E", f"decoder.layers.{layer}.mlp.router.expert_bias")
            if any(name in self.shapes for name, *_ in _homes(link.theirs)):
                places[link.theirs].append(link)
            else:
                ours[link.ours].zero_()
        # By what is read at once, and let go: one tensor, or two halves, of one layer.
        wanted: dict[tuple[tuple[str, ...], int | None], list[tuple[str, tuple[int, ...]]]]
        wanted = collections.defaultdict(list)
        covered: dict[str, set[tuple[int, ...]]] = collections.defaultdict(set)
        for theirs in places:
            names, layer, expert = self._find(theirs)
            wanted[names, layer].append((theirs, expert))
            for name in names:
                covered[name].add((*([] if layer is None else [layer]), *expert))
        for name, indices in covered.items():
            self._check_cover(name, indices)
        left = sorted(name for name in self.shapes if _is_weight(name) and name not in covered)
        if left:
            raise ValueError(f"{left[0]}: is in the checkpoint and not in the model ({len(left)} such weights)")
        for (names, layer), parts in wanted.items():
            halves = [self.tensor(name, layer) for name in names]
            for theirs, expert in parts:
                value = torch.cat([half[expert] for half in halves])
                for link in places[theirs]:
                    _copy(link, value, ours)

    def _check_cover(self, name: str, wanted: set[tuple[int, ...]]) -> None:
        """Raises ValueError where a tensor over layers or experts has others than the model."""
        outer = self.shapes[name][: len(next(iter(wanted)))]
        if wanted != set(itertools.product(*map(range, outer))):
            counted = " x ".join(map(str, outer))
            raise ValueError(f"{name}: holds {counted} weights of layers or experts, and the model has {len(wanted)}")

    def _find(self, theirs: str) -> tuple[tuple[str, ...], int | None, tuple[int, ...]]:
        """Where a tensor of a module lies: the names of one tensor, or of two halves, and which layer and expert of it.

        Raises ValueError where it is nowhere, or of too few dimensions.
        """
        for name, layer, expert in _homes(theirs):
            for names in ((name,), (f"{name}_w", f"{name}_v")):
                if all(each in self.shapes for each in names):
                    outer = (layer is not None) + len(expert)
                    if len({self.shapes[each] for each in names}) > 1 or len(self.shapes[names[0]]) <= outer:
                        shown = ", ".join(f"{each} of shape {list(self.shapes[each])}" for each in names)
                        raise ValueError(f"{shown}: holds no {theirs}; is its .metadata damaged?")
                    return names, layer, expert
        raise ValueError(f"{theirs}: is not in {self.folder}; is it of another model?")


class _PartPlanner(dcp.DefaultLoadPlanner):
    """Reads one layer of a tensor over layers, or all of any tensor, into `part`."""

    def __init__(self, name: str, entry: TensorStorageMetadata, layer: int | None) -> None:
        super().__init__()
        self._name, self._entry = name, entry
        self._box = ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size)
        if layer is not None:
            self._box = ChunkStorageMetadata(
                torch.Size([layer, *self._box.offsets[1:]]), torch.Size([1, *entry.size[1:]])
            )
        self.part = torch.empty(self._box.sizes, dtype=entry.properties.dtype)

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(create_read_items_for_chunk_list(self._name, self._entry, [self._box]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.part


def _copy(link: Link, value: Tensor, ours: Mapping[str, Tensor]) -> None:
    part = link.part(ours[link.ours])
    try:
        their_part = link.their_part(value)
    except RuntimeError:
        their_part = value
    if their_part.shape != part.shape:
        raise ValueError(f"{link.theirs}: has shape {list(value.shape)}, which does not make {link.ours}")
    part.copy_(their_part)


def _homes(theirs: str) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """All names that a tensor of a module may have in a checkpoint, and its layer and expert where there are others."""
    spelled = [theirs]
    spelled += [theirs.replace(name, fused) for name, fused in _FUSED_NORMS.items() if name in theirs]
    for name in spelled:
        own = _LAYER.fullmatch(name)
        layered: list[tuple[str, int | None]] = [(name, None)]
        if own:
            layered.append((f"decoder.layers.{own[2]}", int(own[1])))
        for key, layer in layered:
            expert = _EXPERT.search(key)
            if expert is None:
                yield key, layer, ()
            else:
                yield _EXPERT.sub("experts.experts.", key), layer, (int(expert[1]),)
                yield _EXPERT.sub(f"experts.experts.{expert[1]}.", key), layer, ()


def _is_weight(name: str) -> bool:
    return name.startswith(("decoder.", "embedding.", "output_layer.")) and "._extra_state" not in name


def _line(error: Exception) -> str:
    """What it says, in one line: torch adds what its C++ was doing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); give a folder that Megatron-Core saved with --ckpt-format torch_dist"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return found
