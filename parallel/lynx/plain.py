"""Frozen dataclasses as plain values for YAML and JSON, and back, by their type hints."""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses become mappings, tuples lists."""
    if is_dataclass(value):
        return {each.name: to_plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], given: Any, where: str) -> T:
    """A dataclass of `kind` from what `to_plain` made. Raises ValueError naming `where` for what it did not make."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: {given!r} is no mapping")
    hints = get_type_hints(kind)
    unknown = set(given) - set(hints)
    if unknown:
        raise ValueError(f"{where}: unknown key {min(map(str, unknown))!r}; its keys are {', '.join(hints)}")
    try:
        return kind(**{name: _value(hints[name], item, f"{where}.{name}") for name, item in given.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _value(hint: Any, given: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if given is None else _value(next(a for a in arguments if a is not type(None)), given, where)
    if is_dataclass(hint):
        return from_plain(hint, given, where)  # pyright: ignore[reportArgumentType]
    if origin is tuple:
        if not isinstance(given, list | tuple):
            raise ValueError(f"{where}: {given!r} is no list")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(given))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(given, Mapping):
            raise ValueError(f"{where}: {given!r} is no mapping")
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in given.items()}
    return given


def read_yaml(path: str | Path, what: str) -> Any:
    """Plain values of the file `path`. Raises ValueError, of `what`, where there is none or it is not YAML."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what}: {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{what}: {path}: not YAML") from None


def digest(plain: Any) -> str:
    """16 hexadecimal digits that differ where plain values do."""
    text = json.dumps(plain, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
