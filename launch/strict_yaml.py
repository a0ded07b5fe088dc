"""YAML as configurations need it: YAML 1.2 scalars, no key twice, errors that say file:line:column.

PyYAML speaks YAML 1.1, in which `3e-4` is text, `no` is false and `12:30` is 750; here they are a number and
two texts. Anchors work; merge keys (`<<`), which 1.2 dropped, are ordinary and therefore unknown keys.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from .errors import UserError

# Tag, pattern, characters a match can start with (None: the empty scalar too).
SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
)


class StrictLoader(yaml.SafeLoader):
    """Safe (builds no objects), YAML 1.2 scalars, refuses a key that appears twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in first:
                    problem = f"key {key!r} stands here a second time (first in line {first[key]}); remove one"
                    raise ConstructorError(None, None, problem, key_node.start_mark)
                first[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


class StrictDumper(yaml.SafeDumper):
    """Quotes exactly the texts that StrictLoader would read as something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in SCALARS:
    for _class in (StrictLoader, StrictDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)

StrictDumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def parse_yaml(text: str, where: str) -> Any:
    """Plain values of one YAML document. Raises UserError (`where:line:column: …`) where it is malformed."""
    try:
        return yaml.load(text, StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{place}: {problem}") from error
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be a configuration") from None
    except (yaml.YAMLError, ValueError) as error:
        # Characters that YAML forbids, numbers of thousands of digits.
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error


def read_yaml(path: Path) -> Any:
    """Plain values of the YAML file `path`. Raises UserError where it cannot be read or is malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text; is this a YAML file?") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return parse_yaml(text, str(path))


def to_yaml(value: Any) -> str:
    """Block-style YAML, lists in one line, that `parse_yaml` reads back as `value`; keys keep their order."""
    return yaml.dump(value, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def to_line(value: Any) -> str:
    """`value` as YAML in one line."""
    text = yaml.dump(value, Dumper=StrictDumper, allow_unicode=True, default_flow_style=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")
