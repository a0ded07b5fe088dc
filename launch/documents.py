"""The user's own files as documents: UTF-8 text, one document a file, or JSONL, one document a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

JSONL_SUFFIXES = (".jsonl", ".ndjson")


def read_documents(path: Path) -> Iterator[str]:
    """The texts of one file, line ends as line feeds; JSONL is read line by line and so may be of any size.

    Raises UserError naming the file, and the line where there is one, where it is not what its suffix says.
    """
    try:
        if path.suffix.lower() in JSONL_SUFFIXES:
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_of(line, f"{path}:{number}")
        else:
            yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.object[error.start]:#04x}); convert it, for example with iconv"
        ) from error


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); every line is an object with a `text`") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: no string under `text`; every line is an object with a `text`")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half a surrogate pair at character {error.start} of `text`: not Unicode") from error
    return text
