"""`wastenot doctor --checkpoint PATH`: every tensor and expert is there, with the bytes that were saved, and finite."""

from __future__ import annotations

import json
from pathlib import Path

from ..launch.console import RunConsole
from ..launch.errors import UserError
from ..launch.resumed import checkpoint_in
from ..parallel.checkpoint import verify


def run(path: Path, *, as_json: bool) -> int:
    """Reads all of the checkpoint, the newest where `path` is a run. Raises UserError that says what is wrong."""
    folder = checkpoint_in(path)
    console = RunConsole(speaks=not as_json)
    try:
        with console.following("read", 1) as line:
            manifest = verify(folder, line.portion)
    except ValueError as error:
        raise UserError(str(error)) from error
    chunks = [chunk for entry in manifest.tensors.values() for chunk in entry.chunks]
    experts = max((entry.shape[0] for entry in manifest.tensors.values() if len(entry.shape) > 2), default=0)
    found = {
        "checkpoint": str(folder),
        "step": manifest.step,
        "tensors": len(manifest.tensors),
        "experts": experts,
        "bytes": sum(manifest.files.values()),
        "summed": all(chunk.sums for chunk in chunks),
        "layout": dict(manifest.layout),
    }
    if as_json:
        print(json.dumps(found))
        return 0
    whole = f"{len(manifest.tensors)} tensors" + (f", all {experts} experts of each stack" if experts else "")
    bytes_said = (
        "with the bytes that were saved" if found["summed"] else "in full (it is too old to have sums of bytes)"
    )
    print(f"{folder}: {whole}, there once {bytes_said}; every weight is finite")
    return 0
