"""One rank's part of a checkpoint: which chunks it writes or reads, and the bytes of them.

`torch.distributed.checkpoint`'s planners cut tensors into chunks, give each replicated one to a single rank (the
one with least to write so far) and find the chunks that overlap what a rank wants, whatever layout wrote them.
Storage is safetensors, one file per rank. No communication here; checkpoint.py carries plans between ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .checksums import check_finite, check_sums, sums_of
from .manifest import Chunk, Manifest, TensorEntry, check_coverage, some
from .mesh import Mesh


def expert_dtensor(local: Tensor, mesh: Mesh) -> Tensor:
    """Says that `local` [e, ...] is this rank's part of [E, ...]: sharded over experts, replicated over data.

    Shares memory with `local`, so loading into the result fills `local`. Every rank of the expert axis must
    hold the same number of experts. Without a process group `local` is the whole and comes back as it is.
    Where `local` is a DTensor itself, of experts whose storage ranks share (shard.py), the result is cut as it is, too.
    """
    if mesh.expert_mesh is None:
        return local
    kept: dict[str, Placement] = {"expert": Shard(0)}
    part = local.detach()
    if isinstance(part, DTensor):
        kept |= dict(zip(part.device_mesh.mesh_dim_names or (), part.placements, strict=True))
        part = part.to_local()
    placements = [kept.get(name, Replicate()) for name in mesh.expert_mesh.mesh_dim_names or ()]
    return DTensor.from_local(part, mesh.expert_mesh, placements, run_check=False)


def shard_files(count: int) -> list[str]:
    """Names of the files that `count` ranks write."""
    return [f"shard-{rank:05d}-of-{count:05d}.safetensors" for rank in range(count)]


class ShardWriter:
    """One rank's way through a save: `propose`, on rank 0 `divide` for all, `stage`, then `write`."""

    def __init__(self, tensors: Mapping[str, Tensor], num_stages: int = 1) -> None:
        """`num_stages`: groups of consecutive ranks, as many in each, that hold different tensors."""
        self._tensors = dict(tensors)
        self._num_stages = num_stages
        self._planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def propose(self) -> SavePlan:
        """Every chunk this rank could write. Raises ValueError where a value is not a dense tensor."""
        for name, tensor in self._tensors.items():
            _check_dense(name, tensor)
        self._planner.set_up_planner(self._tensors)
        return self._planner.create_local_plan()

    def divide(self, proposals: list[SavePlan]) -> tuple[list[SavePlan], dict[str, TensorEntry]]:
        """Who writes what (one plan per rank), and what a manifest says of it.

        Raises ValueError where ranks of a stage disagree about names, dtypes or shapes, where two stages have a name
        in common, or where the chunks of all ranks do not cover a tensor exactly once: an expert that nobody holds, or
        two hold.
        """
        _check_agreement(proposals, self._num_stages)
        plans, _ = self._planner.create_global_plan(proposals)
        entries: dict[str, TensorEntry] = {}
        for file, plan in zip(shard_files(len(plans)), plans, strict=True):
            for item in plan.items:
                data = item.tensor_data
                assert data is not None
                chunk = Chunk(file, tuple(data.chunk.offsets), tuple(data.chunk.sizes))
                whole = TensorEntry(data.properties.dtype, tuple(data.size), ())
                entry = entries.get(item.index.fqn, whole)
                entries[item.index.fqn] = replace(entry, chunks=(*entry.chunks, chunk))
        for name, entry in entries.items():
            check_coverage(name, entry)
        return plans, entries

    def stage(self, plan: SavePlan) -> dict[str, Tensor] | Exception:
        """Copies of this rank's chunks in host memory; or what went wrong, for `write_shard` to raise.

        Ranks meet again when they have written: one that raised before would leave the others waiting.
        """
        items = self._planner.finish_plan(plan).items
        try:
            return {item.index.fqn: _host_copy(cast(Tensor, self._planner.resolve_data(item))) for item in items}
        except (RuntimeError, MemoryError) as error:
            return error


def _check_dense(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; a checkpoint holds tensors, put the rest into meta")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise ValueError(f"{name} is not a dense tensor with values ({tensor.layout}, on {tensor.device})")


def _check_agreement(plans: list[SavePlan], num_stages: int) -> None:
    """Same names, dtypes and global shapes on every rank of a stage, and no name in two stages; otherwise one rank's
    copy would silently win."""
    described = [
        {item.index.fqn: (data.properties.dtype, list(data.size)) for item in plan.items if (data := item.tensor_data)}
        for plan in plans
    ]
    each = len(plans) // num_stages
    for rank, other in enumerate(described):
        first = rank // each * each
        for name in sorted(described[first].keys() | other.keys()):
            here, there = described[first].get(name, "missing"), other.get(name, "missing")
            if here != there:
                raise ValueError(f"{name} differs between ranks: {here} on rank {first}, {there} on rank {rank}")
    holders: dict[str, int] = {}
    for first in range(0, len(plans), each):
        for name in described[first]:
            if holders.setdefault(name, first) != first:
                raise ValueError(f"{name} is held by two pipeline stages, by those of rank {holders[name]} and {first}")


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Written:
    """One rank's file."""

    length: int
    """In bytes; 0 where there was nothing to write, and no file."""
    sums: Mapping[str, tuple[int, ...]]
    """`Chunk.sums` of every tensor in it."""


def write_shard(path: Path, copies: dict[str, Tensor] | Exception) -> Written:
    """Writes one rank's file and forces it to the disk; no file where there is nothing.

    Raises ValueError for a weight that is not finite, OSError where the file cannot be written.
    """
    if isinstance(copies, Exception):
        raise copies
    if not copies:
        return Written(0, {})
    for name, copy in copies.items():
        check_finite(name, copy)
    if not path.parent.is_dir():
        raise OSError(f"{path.parent}, made by rank 0, does not exist here: all ranks must share the directory")
    try:
        save_file(copies, path)
        # safetensors makes files for the owner alone; a checkpoint is as readable as its folder.
        path.chmod(path.parent.stat().st_mode & 0o666)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return Written(path.stat().st_size, {name: sums_of(copy) for name, copy in copies.items()})
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path.name}: {error}") from error


def check_match(
    path: Path, manifest: Manifest, tensors: Mapping[str, Tensor], prefix: str, *, in_part: bool = False
) -> None:
    """Raises ValueError unless `tensors` are exactly what the manifest lists under `prefix`; `in_part`: some of it."""
    saved = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    shared = sorted(saved.keys() & tensors.keys())
    shapes = [
        f"{name} {list(saved[name].shape)}, here {list(tensors[name].shape)}"
        for name in shared
        if saved[name].shape != tuple(tensors[name].shape)
    ]
    dtypes = [
        f"{name} {saved[name].dtype}, here {tensors[name].dtype}"
        for name in shared
        if saved[name].dtype != tensors[name].dtype
    ]
    problems = {
        "not in the checkpoint": sorted(tensors.keys() - saved.keys()),
        "only in the checkpoint": [] if in_part else sorted(saved.keys() - tensors.keys()),
        "of another shape": shapes,
        "of another dtype": dtypes,
    }
    _refuse(path, problems)


def check_all_taken(path: Path, manifest: Manifest, taken: Set[str], prefix: str) -> None:
    """Raises ValueError unless ranks that each want a part have `taken` all that the manifest lists under `prefix`."""
    left = sorted(name for name in manifest.tensors if name.startswith(prefix) and name not in taken)
    _refuse(path, {"only in the checkpoint": left})


def _refuse(path: Path, problems: Mapping[str, Sequence[str]]) -> None:
    found = [f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{path} does not fit: {'; '.join(found)}. Use the model and optimizer settings that it was saved with"
        )


def read_shards(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Copies what this rank holds of `tensors` out of the shards that have it."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), _planner_metadata(manifest), is_coordinator=False)
    plan = planner.finish_plan(planner.create_local_plan())
    chunks = {(name, chunk.offset): chunk for name, entry in manifest.tensors.items() for chunk in entry.chunks}
    wanted: dict[str, list[tuple[Chunk, ReadItem]]] = {}
    for item in plan.items:
        index = item.storage_index
        chunk = chunks[index.fqn, tuple(index.offset or ())]
        wanted.setdefault(chunk.file, []).append((chunk, item))
    for file, reads in wanted.items():
        try:
            with safe_open(path / file, framework="pt") as shard:
                for chunk, item in reads:
                    name = item.storage_index.fqn
                    stored = _sound(path, manifest.tensors[name], name, chunk, shard.get_tensor(name))
                    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        stored = stored.narrow(dim, start, length)
                    planner.resolve_tensor(item).detach().copy_(stored)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {file} is unreadable: {error}") from error


def read_tensor(path: Path, manifest: Manifest, name: str, experts: Sequence[int] | None = None) -> Tensor:
    """The tensor `name` of the checkpoint at `path`, whatever layout wrote it; of a stack of matrices those `experts`
    alone, in this order, without reading the others.

    Raises ValueError where a file is damaged.
    """
    entry = manifest.tensors[name]
    shape = entry.shape if experts is None else (len(experts), *entry.shape[1:])
    whole = torch.empty(shape, dtype=entry.dtype)
    for chunk in entry.chunks:
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offset, chunk.shape, strict=True))
        try:
            with safe_open(path / chunk.file, framework="pt") as shard:
                if experts is None:
                    whole[box] = _sound(path, entry, name, chunk, shard.get_tensor(name))
                    continue
                stored = shard.get_slice(name)
                for place, expert in enumerate(experts):
                    if box[0].start <= expert < box[0].stop:
                        row = expert - box[0].start
                        one = replace(
                            chunk,
                            offset=(expert, *chunk.offset[1:]),
                            shape=(1, *chunk.shape[1:]),
                            sums=chunk.sums[row : row + 1],
                        )
                        part = _sound(path, entry, name, one, stored[row : row + 1])
                        whole[place : place + 1][:, *box[1:]] = part
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {chunk.file} is unreadable: {error}") from error
    return whole


def _sound(path: Path, entry: TensorEntry, name: str, chunk: Chunk, stored: Tensor) -> Tensor:
    """`stored`, once it is what the manifest says of `chunk`; ValueError otherwise."""
    check_sums(path, name, chunk, stored)
    if (stored.dtype, tuple(stored.shape)) != (entry.dtype, chunk.shape):
        raise ValueError(f"{path} is damaged: {name} in {chunk.file} is not what the manifest says")
    return stored


def _planner_metadata(manifest: Manifest) -> Metadata:
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in entry.chunks],
            )
            for name, entry in manifest.tensors.items()
        }
    )
