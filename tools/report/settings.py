"""Section of the page: how the runs were configured, and wherein they differ."""

from __future__ import annotations

from collections.abc import Sequence

from ...launch.strict_yaml import to_line
from .formats import NONE
from .headline import Entry
from .markup import Html, element, folded, join, table
from .runs import Run, flat


def settings(entries: Sequence[Entry]) -> Html:
    """What differs (of several runs), and every run's configuration."""
    runs = [entry.run for entry in entries]
    whole = [
        folded(f"Configuration of {run.name}" if len(runs) > 1 else "config.yaml", element("pre", run.config_text))
        for run in runs
    ]
    return join([_differences(runs) if len(runs) > 1 else "", *whole])


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Dotted paths whose values differ between `runs`, with each run's value as YAML; a dash where it has none."""
    flats = [{path: to_line(value) for path, value in flat(run.config).items()} for run in runs]
    paths = dict.fromkeys(path for one in flats for path in one)
    rows = {path: [one.get(path, NONE) for one in flats] for path in paths}
    return {path: row for path, row in rows.items() if len(set(row)) > 1}


def _differences(runs: Sequence[Run]) -> Html:
    found = differences(runs)
    if not found:
        return element("p", "The configurations are equal.")
    rows = [[element("code", path), *(element("code", value) for value in row)] for path, row in found.items()]
    headings = ["what differs", *(run.name for run in runs)]
    return table(headings, rows, label="Differences of configuration", texts=len(headings))
