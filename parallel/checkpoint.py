"""Sharded checkpoints: each rank writes its part, the folder appears complete or not at all.

    checkpointer = Checkpointer(run / "checkpoints", mesh, keep=2)
    checkpointer.save(step, {"model.w": w, "model.experts.w1": expert_dtensor(w1_eDF, mesh)}, {"tokens": 123})
    ...
    checkpointer.wait()
    meta = load(checkpointer.latest(), tensors, mesh)      # another world size, or one process, is fine

`torch.distributed.checkpoint`'s planners decide who writes which chunk (what is replicated is written once, in
equal parts) and who reads which. Its storage is not used: its metadata file is a pickle, which runs code when
it is read. Here weights are safetensors and everything else is JSON (manifest.py).

A checkpoint is written to `.partial-step-…`, forced to the disk and renamed to `step-00000100`; the one it
replaces leaves under `.trash-step-…`. So whatever bears a valid name is whole, however the process ended.

All ranks must see the same directory: several hosts need a shared file system.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan

from .checksums import verify_shards
from .chunks import (
    ShardWriter,
    Written,
    check_all_taken,
    check_match,
    expert_dtensor,
    read_shards,
    shard_files,
    write_shard,
)
from .consult import consult
from .events import Recorders
from .manifest import FILE, Chunk, Manifest, TensorEntry, check_complete, json_copy, read_manifest, write_manifest
from .mesh import Mesh

__all__ = ["Checkpointer", "expert_dtensor", "load", "newest", "read_meta", "verify"]

# `step-00000100`, or `step-00000100-2` where that step is saved a second time.
_COMPLETE = re.compile(r"step-\d{8,}(-\d+)?")
_PARTIAL, _TRASH = ".partial-", ".trash-"

_log = logging.getLogger(__name__)


def newest(directory: Path | str, *, verify: bool = True) -> Path | None:
    """The checkpoint of `directory` that was saved last, or None; for tools that hold no Checkpointer.

    Folders whose manifest is unreadable are passed over with a warning to the log; with `verify` also those
    with a missing or truncated shard or a tensor that is not covered.
    """
    for path, manifest in _by_age(Path(directory)):
        try:
            if verify:
                check_complete(path, manifest)
        except ValueError as error:
            _log.warning("checkpoint passed over: %s", error)
            continue
        return path
    return None


def verify(path: Path | str, progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
    """Proves that the checkpoint at `path` is whole, and returns what it says: every tensor and every expert is there
    once, with the bytes that were saved, and every weight is finite. Raises ValueError that says what is wrong."""
    path = Path(path)
    manifest = read_manifest(path)
    check_complete(path, manifest)
    verify_shards(path, manifest, progress)
    return manifest


def read_meta(path: Path | str) -> dict[str, Any]:
    """The `meta` that the caller of `save` gave. Raises ValueError where `path` is not a checkpoint."""
    return dict(read_manifest(Path(path)).meta)


def load(path: Path | str, tensors: Mapping[str, Tensor], mesh: Mesh, *, prefix: str = "") -> dict[str, Any]:
    """Fills `tensors` in place from the checkpoint at `path`, whatever layout wrote it; returns its `meta`.

    tensors: name -> plain tensor (whole) or `expert_dtensor`; all ranks of `mesh` call this together. Pipeline stages
    pass those of their layers, which together must be all.
    prefix: look only at the checkpoint's tensors whose names start so (`model.` leaves the optimizer out).

    Raises ValueError on every rank, before anything is changed, where the folder is damaged or its names,
    shapes or dtypes are not exactly those of `tensors`; OSError or ValueError where reading fails later.
    """
    path = Path(path)

    def examine() -> tuple[int, int, list[str]]:
        if not (path / FILE).exists() and (inside := newest(path, verify=False)):
            raise ValueError(f"{path} is a directory of checkpoints; name one of them, for example {inside}")
        manifest = read_manifest(path)
        # One rank looks at every file: a thousand ranks would ask for a million of them.
        if mesh.world.rank == 0:
            check_complete(path, manifest)
        check_match(path, manifest, tensors, prefix, in_part=mesh.pipeline.size > 1)
        return manifest.step, manifest.serial, sorted(tensors) if mesh.pipeline.size > 1 else []

    def same(seen: list[tuple[int, int, list[str]]]) -> list[None]:
        if len({(step, serial) for step, serial, _ in seen}) > 1:
            raise ValueError(f"ranks see different checkpoints at {path}: they must share the directory")
        if mesh.pipeline.size > 1:
            check_all_taken(path, read_manifest(path), {name for *_, names in seen for name in names}, prefix)
        return [None] * len(seen)

    def read() -> dict[str, Any]:
        manifest = read_manifest(path)
        read_shards(path, manifest, tensors)
        return dict(manifest.meta)

    consult(mesh.world.group, examine, same, mesh.recorder)
    return consult(mesh.world.group, read, lambda metas: metas, mesh.recorder)


@dataclass(frozen=True)
class _Assignment:
    """What one rank is to write."""

    folder: str
    """Name of the partial folder; each rank knows the directory by its own path."""
    file: str
    plan: SavePlan


class Checkpointer:
    """Writes the checkpoints of one run into `directory`, one at a time, and keeps the newest `keep`.

    All ranks of `mesh` make it and call its methods together, in the same order. One run owns a directory:
    starting it removes what a killed run left unfinished there.

    asynchronous: `save` returns when the tensors are copied to host memory; a thread with its own gloo process
    group writes, so the training collectives of the caller's thread never meet those of the writer. Its
    errors are raised by the next `save`, `wait`, `latest` or `close`. Otherwise `save` returns when the
    checkpoint is complete.

    Raises ValueError where `keep` is not positive, OSError where the directory cannot be made or cleaned.
    """

    def __init__(self, directory: Path | str, mesh: Mesh, *, keep: int = 2, asynchronous: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"keep: {keep} would leave no checkpoint; use 1 or more")
        self._directory = Path(directory)
        self._keep = keep
        self._asynchronous = asynchronous
        self._layout, self._recorder = mesh.layout, mesh.recorder
        self._group: dist.ProcessGroup | None = None
        if mesh.world.group is not None:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._on_root(self._clean)

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Saves `tensors` as the checkpoint of `step`; waits for the one before it first.

        tensors: every rank of a pipeline stage passes the same names, and no other stage any of them; plain tensors are
        the same on all its ranks and are written once, those from `expert_dtensor` each rank in its part. They may be
        changed as soon as this returns.
        meta: anything JSON; rank 0's is kept.

        Raises ValueError on every rank where a value is not a dense tensor, names, shapes or dtypes differ
        between ranks, experts are missing or doubled, or `meta` is not JSON; OSError where the checkpoint
        before (or, if not asynchronous, this one) could not be written: the older ones stay as they were.
        """
        self.wait()
        if step < 0:
            raise ValueError(f"step: {step} is negative; a checkpoint is named by a step from 0 on")
        writer = ShardWriter(tensors, self._layout["pipeline"])
        # Stays on rank 0: as part of an assignment it would travel to every rank.
        draft: Manifest | None = None

        def assign(proposals: list[SavePlan]) -> list[_Assignment]:
            nonlocal draft
            said = json_copy(meta)
            plans, entries = writer.divide(proposals)
            draft = self._draft(step, plans, entries, said)
            folder = f"{_PARTIAL}step-{step:08d}-{secrets.token_hex(4)}"
            (self._directory / folder).mkdir()
            files = shard_files(len(plans))
            return [_Assignment(folder, file, plan) for file, plan in zip(files, plans, strict=True)]

        mine = consult(self._group, writer.propose, assign, self._recorder)
        shard = self._directory / mine.folder / mine.file
        self._pending = self._thread.submit(self._write, step, shard, writer.stage(mine.plan), draft)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises OSError where the last checkpoint was not written."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        finally:
            # After an interrupt the writer still runs and still owns the process group.
            if self._pending.done():
                self._pending = None

    def latest(self, *, verify: bool = True) -> Path | None:
        """The checkpoint saved last, the same on every rank, or None; see `newest`. Waits as `wait` does."""
        self.wait()
        return self._on_root(lambda: newest(self._directory, verify=verify))

    def close(self) -> None:
        """Waits as `wait` does and ends the writing thread; call it before the process group is destroyed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    @property
    def _rank(self) -> int:
        return 0 if self._group is None else dist.get_rank(self._group)

    def _on_root(self, decide: Callable[[], Any]) -> Any:
        return consult(self._group, lambda: None, lambda answers: [decide()] * len(answers), self._recorder)

    def _clean(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if path.name.startswith((_PARTIAL, _TRASH)):
                shutil.rmtree(path)

    def _draft(
        self, step: int, plans: list[SavePlan], entries: dict[str, TensorEntry], meta: dict[str, Any]
    ) -> Manifest:
        """The manifest, but for the lengths of the files."""
        serials = [manifest.serial for _, manifest in _by_age(self._directory, quiet=True)]
        return Manifest(
            step=step,
            serial=max(serials, default=0) + 1,
            layout=self._layout,
            meta=meta,
            tensors=entries,
            files={file: 0 for file, plan in zip(shard_files(len(plans)), plans, strict=True) if plan.items},
        )

    def _write(self, step: int, shard: Path, copies: dict[str, Tensor] | Exception, draft: Manifest | None) -> None:
        """Everything after the copies are taken; in the thread of its own."""

        def publish(written: list[Written]) -> list[None]:
            assert draft is not None
            files = dict(zip(shard_files(len(written)), written, strict=True))
            self._publish(shard.parent, _completed(draft, files))
            return [None] * len(written)

        try:
            # Heard by nobody: recorders follow one thread, that of the training.
            consult(self._group, lambda: write_shard(shard, copies), publish, Recorders())
        except Exception as error:
            if self._rank == 0:
                shutil.rmtree(shard.parent, ignore_errors=True)
            raise OSError(
                f"checkpoint of step {step} was not written to {self._directory}: {error} "
                f"(older checkpoints there are untouched)"
            ) from error

    def _publish(self, folder: Path, manifest: Manifest) -> None:
        """Rank 0, when every shard is on the disk: from partial to complete, then what is too old goes."""
        write_manifest(folder, manifest)
        try:
            check_complete(folder, manifest)
        except ValueError as error:
            raise ValueError(f"{error}; all ranks must share the directory") from error
        _sync_folder(folder)
        name = f"step-{manifest.step:08d}"
        # A step saved before keeps its folder until this one is complete: there is never a moment without.
        names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
        folder.rename(next(path for each in names if not (path := self._directory / each).exists()))
        _sync_folder(self._directory)
        self._prune()

    def _prune(self) -> None:
        whole = [path for path, manifest in _by_age(self._directory, quiet=True) if _is_complete(path, manifest)]
        for path in whole[self._keep :]:
            trash = self._directory / f"{_TRASH}{path.name}-{secrets.token_hex(4)}"
            try:
                path.rename(trash)
                shutil.rmtree(trash)
            except OSError as error:
                # The checkpoint that was just written is good: this is no reason to stop.
                _log.warning("old checkpoint %s could not be removed: %s", path, error)


def _completed(draft: Manifest, written: Mapping[str, Written]) -> Manifest:
    """`draft` with the lengths of its files and the sums of what is in them."""

    def summed(name: str, chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
        return tuple(replace(chunk, sums=written[chunk.file].sums[name]) for chunk in chunks)

    return replace(
        draft,
        files={file: written[file].length for file in draft.files},
        tensors={name: replace(entry, chunks=summed(name, entry.chunks)) for name, entry in draft.tensors.items()},
    )


def _by_age(directory: Path, *, quiet: bool = False) -> list[tuple[Path, Manifest]]:
    """The folders with a valid name and a readable manifest, newest first."""
    found: list[tuple[Path, Manifest]] = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if not _COMPLETE.fullmatch(path.name):
            continue
        try:
            found.append((path, read_manifest(path)))
        except ValueError as error:
            if not quiet:
                _log.warning("checkpoint passed over: %s", error)
    return sorted(found, key=lambda item: item[1].serial, reverse=True)


def _is_complete(path: Path, manifest: Manifest) -> bool:
    try:
        check_complete(path, manifest)
    except ValueError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Forces the folder's entries to the disk: a file without its name is as good as lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
