"""Checkpoints that DeepSpeed writes: where they are, which is whole, and the weights in them without DeepSpeed.

A checkpoint of step 100 is `checkpoints/step-00000100`: DeepSpeed's own files, and `wastenot.json` with what the run
needs to go on. It is written as `.partial-step-00000100` and renamed when all of it is on the disk, so whatever bears
a valid name is whole. `latest` beside it names the one that was saved last.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...parallel.consult import consult
from ...parallel.manifest import FILE as OURS
from ...parallel.mesh import Mesh
from ..errors import UserError
from ..run_folder import write_atomically
from .deepspeed_json import changed_sharing

_log = logging.getLogger(__name__)

FILE = "wastenot.json"
_SAYS = ("layout", "zero", "zero_optimization", "config", "progress", "files")
"""What is in it."""
_COMPLETE = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_PARTIAL, _TRASH, _LATEST = ".partial-", ".trash-", "latest"
_WHOLE, _DECODER = "mp_rank_00_model_states.pt", "decoder."
_EXPERT = re.compile(r"expert_layers\.([^.]+)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(\w+)")


_OF_DEEPSPEED = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What it pickles beside tensors: making one runs nothing else."""


class _Ignored:
    """Stands for an object of DeepSpeed's."""

    def __init__(self, *parts: object) -> None:
        pass


def newest(directory: Path) -> Path | None:
    """The checkpoint of `directory` that was saved last, or None."""
    found = _by_age(directory)
    return found[0] if found else None


def find(path: Path, step: int | None = None) -> Path:
    """The checkpoint that `path` is, or the newest (or that of `step`) of the run or `checkpoints` folder that it is.

    Raises UserError where there is none.
    """
    if (path / FILE).is_file() and step is None:
        return path
    for folder in (path, path / "checkpoints"):
        found = _by_age(folder)
        wanted = [each for each in found if step is None or _step(each) == step]
        if wanted:
            return wanted[0]
        if found:
            steps = ", ".join(map(str, sorted({_step(each) for each in found})))
            raise UserError(f"{path} has no checkpoint of step {step}; it has {steps}")
        if (folder / OURS).is_file() or any(folder.glob(f"step-*/{OURS}")):
            raise UserError(
                f"{path} holds checkpoints of engine: native, not of DeepSpeed; use engine: native, or train.start to "
                "begin with the weights of a run"
            )
    raise UserError(f"{path} holds no complete checkpoint of DeepSpeed; give a run, or one of its checkpoints/step-…")


def read_meta(path: Path) -> dict[str, Any]:
    """What `save` was given, and `files`: bytes by name. UserError where `path` is no checkpoint."""
    try:
        saved = json.loads((path / FILE).read_text(encoding="utf-8"))
        missing = [name for name in _SAYS if name not in saved]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no checkpoint of DeepSpeed that wastenot wrote ({error})") from error
    if missing:
        raise UserError(f"{path} is no checkpoint of DeepSpeed that wastenot wrote ({FILE} has no {missing[0]})")
    return saved


def clean(directory: Path) -> None:
    """Removes what a killed run left unfinished."""
    for path in directory.glob(".*"):
        if path.name.startswith((_PARTIAL, _TRASH)):
            shutil.rmtree(path)


def save(engine: Any, directory: Path, step: int, meta: Mapping[str, Any], mesh: Mesh, keep: int) -> None:
    """Saves what `engine` holds as the checkpoint of `step`, and leaves the newest `keep`; all ranks together."""
    partial = directory / f"{_PARTIAL}step-{step:08d}"
    engine.save_checkpoint(str(directory), tag=partial.name, client_state={"wastenot": dict(meta)}, save_latest=False)

    def publish() -> None:
        files = {file.name: file.stat().st_size for file in partial.iterdir()}
        write_atomically(partial / FILE, json.dumps({**meta, "files": files}))
        for file in partial.iterdir():
            _to_disk(file)
        _to_disk(partial)
        name = f"step-{step:08d}"
        # A step saved before keeps its folder: there is never a moment without.
        names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
        path = next(path for each in names if not (path := directory / each).exists())
        partial.rename(path)
        write_atomically(directory / _LATEST, path.name)
        _to_disk(directory)
        prune(directory, keep)

    on_root(mesh, publish)


def prune(directory: Path, keep: int) -> None:
    """Leaves the newest `keep` checkpoints of `directory`; warns of those that cannot be removed."""
    for old in _by_age(directory)[keep:]:
        trash = directory / f"{_TRASH}{old.name}"
        try:
            old.rename(trash)
            shutil.rmtree(trash)
        except OSError as error:
            # What was just written is good: this is no reason to stop.
            _log.warning("old checkpoint %s could not be removed: %s", old, error)


def on_root(mesh: Mesh, do: Any) -> Any:
    """What `do` returns on rank 0, on all ranks; its errors too."""
    return consult(mesh.world.group, lambda: None, lambda answers: [do()] * len(answers), mesh.recorder)


def refuse_other_layout(
    path: Path, saved: Mapping[str, Any], mesh: Mesh, zero: int, sharing: Mapping[str, Any]
) -> None:
    """Raises UserError where DeepSpeed could not load the checkpoint at `path` here, or only into other places.

    sharing: `zero_optimization` of this run's DeepSpeed JSON.
    """
    before, here = {**saved["layout"], "zero": saved["zero"]}, {**mesh.layout, "zero": zero}
    wrong = [f"{name} {before[name]}, not {here[name]}" for name in here if before[name] != here[name]]
    # Of another stage it differs anyway.
    wrong = wrong or changed_sharing(saved["zero_optimization"], sharing)
    if wrong:
        raise UserError(
            f"{path} was saved with {', '.join(wrong)}: DeepSpeed resumes in the same layout; use that, or make it "
            "a run of ours: wastenot convert from-deepspeed"
        )


def prove(path: Path, saved: Mapping[str, Any], mesh: Mesh) -> None:
    """Raises ValueError on all ranks where files of the checkpoint at `path` are not whole, or hold more than data:
    DeepSpeed would run code in them. Every rank reads some of them, one at a time.
    """

    def read_own() -> None:
        refuse_missing(path, saved)
        # Whatever lies there may be read by DeepSpeed.
        for file in sorted(path.glob("*.pt"))[mesh.world.rank :: mesh.world.size]:
            _read(file)

    consult(mesh.world.group, read_own, lambda answers: answers, mesh.recorder)


def refuse_missing(path: Path, saved: Mapping[str, Any]) -> None:
    """Raises UserError where a file that was `saved` is missing, or not as long as it was."""
    for name, size in saved["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise UserError(f"{file} {state}; the checkpoint is not whole: use another one")


def one_line(error: Exception) -> str:
    """What went wrong, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def weights(path: Path, zero: int) -> dict[str, Tensor]:
    """Parameters and buffers of the whole model by their names in it, as they were trained."""
    if zero == 3:
        return _assembled(path)
    tensors = {
        name.removeprefix(_DECODER): tensor
        for name, tensor in _read(path / _WHOLE)["module"].items()
        if name.startswith(_DECODER)
    }
    stacks: dict[str, dict[int, Tensor]] = {}
    for file in path.glob("layer_*_expert_*_mp_rank_00_model_states.pt"):
        for full_name, tensor in _read(file).items():
            match = _EXPERT.fullmatch(full_name)
            if match is None:
                raise ValueError(f"{file}: {full_name} is no expert of ours")
            layer, number, name = match.groups()
            stacks.setdefault(f"{layer.replace('/', '.')}.{name}", {})[int(number)] = tensor
    return tensors | {name: torch.stack([parts[n] for n in range(len(parts))]) for name, parts in stacks.items()}


def _assembled(path: Path) -> dict[str, Tensor]:
    """Of ZeRO 3: every rank's file has an equal part of each parameter, one after the other, the last ones padded."""
    states = sorted(
        path.glob("zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=lambda file: int(file.name.split("_")[3])
    )
    ranks = [torch.cat(_read(file)["optimizer_state_dict"]["fp32_flat_groups"]) for file in states]
    about = _read(path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    tensors = {name: about["module"][name] for name in about["buffer_names"]}
    start = 0
    for name, shape in ((name, shape) for group in about["param_shapes"] for name, shape in group.items()):
        size = math.prod(shape)
        part = math.ceil(size / len(ranks))
        tensors[name] = torch.cat([flat[start : start + part] for flat in ranks])[:size].view(shape)
        start += part
    return {name.removeprefix(_DECODER): tensor for name, tensor in tensors.items()}


def _read(file: Path) -> dict[str, Any]:
    """What DeepSpeed pickled, on the host. Code in it is not run: of DeepSpeed's own objects nothing is made.

    Raises UserError where there is anything else, OSError where there is no file.
    """
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in _OF_DEEPSPEED]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # torch's own words are of how to run that code.
        raise UserError(f"{file} holds code, or is damaged; it was not loaded") from error


def _by_age(directory: Path) -> list[Path]:
    """Whole checkpoints, newest first."""
    found = [path for path in directory.glob("step-*") if _COMPLETE.fullmatch(path.name) and (path / FILE).is_file()]
    latest = directory / _LATEST
    last = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    return sorted(found, key=lambda path: (path.name == last, _step(path), len(path.name), path.name), reverse=True)


def _step(path: Path) -> int:
    match = _COMPLETE.fullmatch(path.name)
    return int(match[1]) if match else -1


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
