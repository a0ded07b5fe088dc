"""`-s a.b=c`: single values set over what a YAML file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import UserError
from .strict_yaml import parse_yaml


def override(mapping: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with every `a.b=value` set, in order; values are YAML.

    A section that is null or absent becomes a mapping. Raises UserError where a setting is no `key=value`,
    its value no YAML, or its path leads through a value.
    """
    result = dict(mapping)
    for setting in settings:
        path, separator, text = setting.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not separator or not all(keys):
            raise UserError(f"-s {setting}: not a setting; write it as key=value, for example -s train.steps=100")
        section = result
        for depth, key in enumerate(keys[:-1], 1):
            inner = section.get(key)
            if inner is not None and not isinstance(inner, Mapping):
                above = ".".join(keys[:depth])
                raise UserError(f"-s {setting}: {above} holds a value, not keys; set {above} itself")
            # A copy, so that the caller's mapping stays as it is.
            section[key] = dict(inner or {})
            section = section[key]
        section[keys[-1]] = parse_yaml(text, f"-s {setting}")
    return result
