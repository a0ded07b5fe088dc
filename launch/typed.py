"""Plain YAML values into frozen dataclasses; every mismatch is noted, not only the first."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import Violation
from .strict_yaml import to_line
from .units import parse_size

T = TypeVar("T")

ALLOWED = {
    int: "a whole number (12, 1e6, 25MiB)",
    float: "a number (0.1, 3e-4)",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}


@dataclass
class Findings:
    """What was wrong so far, and which paths therefore hold values that no further rule can be judged by."""

    violations: list[Violation] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def add(self, path: str, message: str) -> None:
        self.violations.append(Violation((path,), message))
        self.broken.add(path)

    def judge(self, violations: list[Violation]) -> None:
        """Adds those of `violations` that do not rest on values already found wrong: causes, not consequences."""
        sound = [violation for violation in violations if not any(map(self._is_broken, violation.paths))]
        self.violations += sound
        self.broken.update(violation.paths[0] for violation in sound)

    def _is_broken(self, path: str) -> bool:
        return any(path == bad or path.startswith(f"{bad}.") for bad in self.broken)


class MismatchError(Exception):
    """A value is not of the wanted type; the text, if any, says more than that."""


def build(owner: type[T], given: object, path: str, findings: Findings, root: type | None = None) -> T | None:
    """An `owner` (a dataclass) from the mapping `given`, which stands at YAML `path`.

    What is wrong goes to `findings` and the field takes its default; None where it has none. `root`, the
    dataclass of the whole file (default: `owner`), tells whether an unknown key belongs to another section.
    """
    root = root or owner
    kinds = get_type_hints(owner)
    if not isinstance(given, Mapping):
        findings.add(path, f"{show(given)} is not a mapping; its keys are {', '.join(kinds)}")
        return _default(owner)
    values: dict[str, Any] = {}
    for key, value in given.items():
        place = _join(path, key)
        if key not in kinds:
            findings.add(place, f"unknown key; {_suggest(str(key), kinds, path, root)}")
            continue
        converted = _convert(kinds[key], value, place, findings, root)
        if converted is not MISSING:
            values[key] = converted
    for f in _required(owner):
        if f not in given:
            findings.add(_join(path, f), f"missing and without a default; give {_allowed(kinds[f])}")
    if any(f not in values for f in _required(owner)):
        return None
    unread = [key for key in given if key in kinds and key not in values]
    return _construct(owner, values, unread, path, findings)


def _construct(owner: type[T], values: dict[str, Any], unread: list[str], path: str, findings: Findings) -> T | None:
    """`owner(**values)`; each field that the owner's own check names is noted and takes its default.

    `unread` are the fields that hold defaults already because their values could not be read.
    """
    reset = list(unread)
    while True:
        try:
            return owner(**values)
        except ValueError as error:
            name, _, message = str(error).partition(": ")
            known = name in get_type_hints(owner)
            # Once defaults stand in for broken fields, a clash with one of them is not the user's.
            if not reset or (name in values and not any(re.search(rf"\b{r}\b", message) for r in reset)):
                findings.add(_join(path, name) if known else path, message if known else str(error))
            if name in values and name not in _required(owner):
                reset.append(name)
                del values[name]
            else:
                return _stand_in(owner, values, path, findings)


def _stand_in(owner: type[T], values: dict[str, Any], path: str, findings: Findings) -> T | None:
    """An `owner` of defaults where its own fields clash; the sections below it stay as they are."""
    if _required(owner):
        findings.broken.add(path)
        return None
    sections = {name: value for name, value in values.items() if is_dataclass(value)}
    findings.broken.update(_join(path, name) for name in get_type_hints(owner) if name not in sections)
    return owner(**sections)


def _convert(kind: Any, value: object, path: str, findings: Findings, root: type) -> Any:
    """`value` as the annotation `kind` of a field; MISSING, and a finding, where it is something else."""
    kinds = _members(kind)
    if value is None and NoneType in kinds:
        return None
    for option in kinds:
        if is_dataclass(option):
            built = build(option, value, path, findings, root)  # type: ignore[arg-type]
            return MISSING if built is None else built
    why = ""
    for option in kinds:
        try:
            return _scalar(option, value)
        except MismatchError as mismatch:
            why = str(mismatch)
    if len(kinds) > 1 or not why:
        why = f"{show(value)} is not {_allowed(kind)}{_nearest(kind, value)}"
    findings.add(path, why)
    return MISSING


def _scalar(kind: Any, value: object) -> Any:
    """`value` as one type, without guessing: raises MismatchError where it is of another."""
    if get_origin(kind) is Literal:
        if isinstance(value, str) and value in get_args(kind):
            return value
    elif get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_scalar(get_args(kind)[0], item) for item in value)
    elif kind is int:
        return _whole(value)
    elif kind is float:
        return _real(value)
    elif isinstance(value, kind):
        return value
    raise MismatchError


def _whole(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value):
        if value.is_integer():
            return int(value)
        raise MismatchError(f"{value} is not a whole number; use {math.floor(value)} or {math.ceil(value)}")
    if isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as error:
            raise MismatchError(str(error)) from error
    raise MismatchError


def _real(value: object) -> float:
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        raise MismatchError
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise MismatchError from None
    if not math.isfinite(number):
        raise MismatchError(f"{show(value)} is not a finite number; use for example 0.1 or 3e-4")
    return number


def show(value: object) -> str:
    """`value` as a YAML file would spell it, short enough for one line."""
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(value) if isinstance(value, str) else to_line(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _members(kind: Any) -> tuple[Any, ...]:
    """The types a union is made of; a type that is no union is its own only member."""
    is_plain = isinstance(kind, type) or get_origin(kind) in (Literal, tuple)
    return (kind,) if is_plain else get_args(kind)


def _allowed(kind: Any) -> str:
    """What `kind` admits, in words."""
    words = []
    for option in _members(kind):
        if get_origin(option) is Literal:
            choices = [str(choice) for choice in get_args(option)]
            words.append(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
        elif get_origin(option) is tuple:
            words.append("a list of whole numbers ([10, 12])")
        else:
            words.append(ALLOWED.get(option, "a mapping"))
    return " or ".join(words)


def _nearest(kind: Any, value: object) -> str:
    """`; nearest: x` where something close to `value` is legal."""
    choices = [choice for option in _members(kind) if get_origin(option) is Literal for choice in get_args(option)]
    if bool in _members(kind):
        meant = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
        close = [meant[str(value).lower()]] if str(value).lower() in meant else []
    elif str in _members(kind) and isinstance(value, int | float):
        close = [f"'{show(value)}', in quotes"]
    else:
        close = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.3)
    return f"; nearest: {close[0]}" if close else ""


def _suggest(key: str, known: Mapping[str, Any], path: str, root: type) -> str:
    """Where an unknown `key` was probably meant to go."""
    elsewhere = [place for place in _paths(root, "") if place.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {_join(path, close[0])}?"
    far = difflib.get_close_matches(key, {p.rpartition(".")[2]: p for p in _paths(root, "")}, n=1, cutoff=0.8)
    if far:
        return f"did you mean {' or '.join(p for p in _paths(root, '') if p.rpartition('.')[2] == far[0])}?"
    return f"known here: {', '.join(known)}"


def _paths(owner: type, path: str) -> Iterator[str]:
    """YAML paths of all fields below `owner`."""
    for name, kind in get_type_hints(owner).items():
        yield _join(path, name)
        for option in _members(kind):
            if is_dataclass(option):
                yield from _paths(option, _join(path, name))  # type: ignore[arg-type]


def _required(owner: type) -> list[str]:
    return [f.name for f in fields(owner) if f.default is MISSING and f.default_factory is MISSING]


def _default(owner: type[T]) -> T | None:
    return None if _required(owner) else owner()


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
