"""A YAML file becomes a TrainConfig, or one UserError that names everything wrong with it. Torch-free.

`load_config` is the whole way: find the file, read it strictly, set the overrides, convert every value, let
each owner check itself, then check what spans owners (`rules.py`) and what must exist on this machine.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import UserError, all_together
from .overrides import override
from .rules import CROSS_RULES, FILE_RULES, Rule
from .strict_yaml import parse_yaml, read_yaml, to_yaml
from .typed import Findings, build

cross_rules = CROSS_RULES


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration in the file `path`, or the packaged one (`quickstart`, `models/mixtral-8x7b`).

    `overrides` are settings `a.b=value`. Raises UserError naming every violation.
    """
    where = str(path)
    given = _read(Path(path))
    if given is None:
        raise UserError(f"{where}: the file is empty; write {{}} to take every default")
    if isinstance(given, Mapping):
        given = override(given, overrides)
    if overrides:
        where += f" with {', '.join(f'-s {setting}' for setting in overrides)}"
    return _checked(given, where, (*CROSS_RULES, *FILE_RULES))


def parse_config(mapping: Mapping[str, Any], where: str) -> TrainConfig:
    """The configuration in plain values; errors name `where` they are from.

    Looks at no file, so a configuration that was saved elsewhere can be read. Raises UserError naming every
    violation.
    """
    return _checked(mapping, where, CROSS_RULES)


def dump_config(config: TrainConfig) -> str:
    """YAML with every field of `config`, from which `parse_config` makes an equal one."""
    return to_yaml(as_mapping(config))


def as_mapping(config: TrainConfig) -> dict[str, Any]:
    """`config` as plain values: mappings, lists, texts, numbers."""
    return asdict(config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


def packaged() -> list[str]:
    """Names of the configurations of runs that come with the package, sorted."""
    return sorted(_runs())


def _checked(given: object, where: str, rules: Sequence[Rule]) -> TrainConfig:
    findings = Findings()
    config = build(TrainConfig, given, "", findings)
    assert config is not None, "every field of TrainConfig has a default"
    if "" not in findings.broken:
        for rule in rules:
            findings.judge(rule(config))
    if findings.violations:
        raise all_together(where, findings.violations)
    return config


def _read(path: Path) -> Any:
    if path.is_dir():
        inside = path / "config.yaml"
        raise UserError(f"{path}: a folder; " + (f"did you mean {inside}?" if inside.is_file() else "give a YAML file"))
    if path.exists():
        return read_yaml(path)
    known = _runs()
    name = path.as_posix().removesuffix(".yaml")
    if name in known:
        return parse_yaml(known[name], f"{name}.yaml")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the package has {', '.join(sorted(known))}"
    raise UserError(f"{path}: no such file, and no configuration of that name; {hint}")


def _runs() -> dict[str, str]:
    """YAML of the configurations of runs by name. Clusters are none, nor are shapes in Hugging Face's keys."""
    entries = _packaged(files("wastenot.configs"), "")
    texts = {name: entry.read_text(encoding="utf-8") for name, entry in entries if not name.startswith("clusters/")}
    return {name: text for name, text in texts.items() if "\nmodel_type:" not in f"\n{text}"}


def _packaged(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith("_"):
            yield from _packaged(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield f"{prefix}{entry.name.removesuffix('.yaml')}", entry
