"""The file that a command was told to write: checked before the work, never left half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..launch.errors import UserError


def check_output(output: Path, mark: bytes, what: str, usual: str) -> None:
    """Raises UserError where `output` would replace something else than `what`, or cannot stand where it should.

    mark: bytes near the beginning of every `what`; usual: a file name, for the message.
    """
    with refusals_named(output):
        if output.is_dir():
            raise UserError(f"{output} is a folder; name a file, for example {output / usual}")
        if not output.parent.is_dir():
            raise UserError(f"{output}: there is no folder {output.parent}; make it, or name another file")
        if output.exists():
            with output.open("rb") as file:
                if mark not in file.read(1000):
                    raise UserError(f"{output} exists and is not {what}; name another file")


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A name beside `output` to write to, which replaces it in one step; nothing stays beside it where that fails.

    Raises UserError where the file cannot be written.
    """
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with refusals_named(output):
            yield beside
            beside.replace(output)
    finally:
        with suppress(OSError):
            beside.unlink()


@contextmanager
def refusals_named(output: Path) -> Iterator[None]:
    """Raises UserError about `output` for what the operating system refuses."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); name another file") from error
