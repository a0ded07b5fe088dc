"""A folder that is written file by file, survives a kill, and appears under its name when it is complete.

It grows as `.NAME.partial`, or with another ending where it is made in another way. A journal in it names what it is
being made of and every file that is finished, forced to the disk before the journal says so. Whoever makes the same
thing again goes on behind the last finished file; what was to become something else is thrown away.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Partial", "check_target"]

_JOURNAL = "journal.jsonl"


def check_target(target: Path) -> None:
    """Raises ValueError where there is something under that name already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists; name a new folder")


class Partial:
    """The folder that will be `target`."""

    def __init__(self, target: Path, identity: Mapping[str, Any], ending: str = "partial") -> None:
        """Goes on with what is there of the same `identity` (JSON), or begins. Raises OSError where that fails."""
        self.target = target
        self.path = target.with_name(f".{target.name}.{ending}")
        self.finished: dict[str, Any] = {}
        """Name of each finished file -> what was noted of it."""
        said = json.loads(json.dumps(dict(identity)))
        lines = self._read_journal()
        if lines and lines[0] == said:
            self.finished = {line["file"]: line["note"] for line in lines[1:] if self._is_whole(line)}
        else:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
        # Anew, so that a line that a kill cut short does not stay.
        notes = [{"file": file, "bytes": self._size(file), "note": note} for file, note in self.finished.items()]
        self._put(_JOURNAL, "".join(json.dumps(line) + "\n" for line in [said, *notes]))

    def write(self, file: str, save: Callable[[Path], Any]) -> Any:
        """`save`s the file of that name, which returns what is to be noted of it (JSON), and says it is finished."""
        path = self.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        note = json.loads(json.dumps(save(path)))
        # safetensors makes files for the owner alone.
        path.chmod(path.parent.stat().st_mode & 0o666)
        _sync(path)
        _sync(path.parent)
        self.finished[file] = note
        with (self.path / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"file": file, "bytes": self._size(file), "note": note}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        return note

    def add(self, file: str, text: str) -> None:
        """Writes a small file, each time anew."""
        self._put(file, text)

    def copy(self, source: Path, file: str) -> None:
        """Copies a small file, each time anew."""
        path = self.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        _sync(path)

    def complete(self) -> None:
        """Gives the folder its name."""
        (self.path / _JOURNAL).unlink()
        for folder in [path for path in self.path.rglob("*") if path.is_dir()]:
            _sync(folder)
        _sync(self.path)
        self.path.rename(self.target)
        _sync(self.target.parent)

    def _put(self, file: str, text: str) -> None:
        """In one step: half a file would stay after a kill."""
        path = self.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(text, encoding="utf-8")
        _sync(beside)
        beside.replace(path)

    def _read_journal(self) -> list[Any]:
        lines: list[Any] = []
        try:
            for line in (self.path / _JOURNAL).read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(line))
        except (OSError, ValueError):
            # None yet, or its last line was being written.
            pass
        return lines

    def _is_whole(self, line: Mapping[str, Any]) -> bool:
        return (self.path / line["file"]).is_file() and self._size(line["file"]) == line["bytes"]

    def _size(self, file: str) -> int:
        return (self.path / file).stat().st_size


def _sync(path: Path) -> None:
    """Forces a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
