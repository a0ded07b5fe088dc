"""What the documentation says exists, does: its code runs, its commands and links are real."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

from wastenot.tools.cli import COMMANDS
from wastenot.tools.compress.command import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "docs/running.md", "docs/model.md"} <= set(map(name_of, PAGES))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_runs(page, capsys):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, {})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page):
    text = page.read_text(encoding="utf-8")
    for command, rest in re.findall(
        r"wastenot (\w+)\b([^\n`#]*)", " ".join(re.findall(r"(?:^    .*$|`[^`]+`)", text, re.M))
    ):
        assert command in COMMANDS, command
        parser = argparse.ArgumentParser()
        importlib.import_module(_module_of(command, rest)).add_arguments(parser)
        known = _options(parser)
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", rest.split("wastenot")[0]):
            assert option in known, f"{command} {option}"


def _module_of(command: str, rest: str) -> str:
    """Of a command, or of the stage of `compress` that follows it."""
    stage = rest.split()[0] if rest.split() else ""
    return f"wastenot.tools.compress.{stage}" if command == "compress" and stage in STAGES else COMMANDS[command]


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Long options of a parser and its sub-parsers."""
    found = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found |= _options(child)
    return found
