"""`wastenot doctor --layout CONFIG`: the grid of ranks that a configuration asks for, before any is started."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..launch.config import TrainConfig
from ..launch.errors import UserError, all_together
from ..launch.layout_rules import world_rules
from ..launch.settings import load_config
from ..parallel.places import DENSE, Place, lines, places
from .output import check_output, replacing
from .report.palette import LIGHT

PICTURE = "ranks.png"
MARK = b"\x89PNG"
MOST_DRAWN = 256
"""Ranks in a terminal or a picture; `--json` has them all."""

_AXES = {
    "pipeline": "hidden states go from stage to stage",
    "data": "gradients of dense weights are summed",
    "shard": "dense weights are gathered, their gradients scattered",
    "tensor": "activations of dense layers are gathered and scattered",
    "expert_data": "gradients of experts are summed",
    "expert": "tokens travel to experts and back",
}
"""Every axis and what its ranks exchange."""


@dataclass(frozen=True)
class Grid:
    """The ranks of a configuration."""

    config: TrainConfig
    name: str
    ranks: list[Place]

    def size(self, axis: str) -> int:
        return 1 + max(getattr(place, axis) for place in self.ranks)

    def experts(self, place: Place) -> range:
        """Experts that a rank holds of every layer with experts; of the fullest, where layers differ."""
        share = max(self.config.model.expert_counts.values(), default=0) // self.config.parallel.expert
        return range(place.expert * share, (place.expert + 1) * share)


def grid_of(name: str, settings: list[str], world: int | None) -> Grid:
    """That of the configuration `name`, on `world` ranks or as many as it asks for; UserError where it asks amiss."""
    config = load_config(name, settings)
    if world is not None and world < 1:
        raise UserError(f"--ranks: {world} is not a number of ranks; use 1 or more")
    world = world or config.train.nproc or config.parallel.world()
    if violations := world_rules(config, world):
        raise all_together(name, violations)
    return Grid(config, name, places(config.parallel, world))


def show(grid: Grid, *, as_json: bool, picture: Path | None) -> None:
    """Prints the grid, and draws it where a picture is asked for."""
    if picture is not None:
        check_output(picture, MARK, "a PNG picture", PICTURE)
        _draw(grid, picture)
    if as_json:
        print(json.dumps(_as_json(grid), indent=2))
        return
    console = Console(highlight=False)
    degrees = " × ".join(f"{axis} {grid.size(axis)}" for axis in DENSE)
    counts = set(grid.config.model.expert_counts.values())
    which = " (here those of the fullest layer)" if len(counts) > 1 else ""
    console.print(f"{grid.name}: {len(grid.ranks):,} ranks = {degrees}; experts over {grid.size('expert')}{which}")
    for stage in range(grid.size("pipeline")):
        if stage * len(grid.ranks) // grid.size("pipeline") >= MOST_DRAWN:
            console.print(f"… and {grid.size('pipeline') - stage} more stages (--json has them all)")
            break
        console.print(_stage_table(grid, stage))
    console.print(_axis_table(grid))
    if picture is not None:
        console.print(f"written: {picture}")


def _stage_table(grid: Grid, stage: int) -> Table:
    """One stage: a row for each rank that reads other sequences, a column for each tensor-parallel rank."""
    several = grid.size("pipeline") > 1
    table = Table(
        title=f"stage {stage}" if several else None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    table.add_column("")
    for tensor in range(grid.size("tensor")):
        table.add_column(f"tensor {tensor}" if grid.size("tensor") > 1 else "rank")
    rows: dict[tuple[int, int], list[str]] = {}
    for place in grid.ranks:
        if place.pipeline == stage:
            rows.setdefault((place.data, place.shard), []).append(_cell(grid, place))
    for (data, shard), cells in list(rows.items())[:MOST_DRAWN]:
        table.add_row(f"data {data}" + (f", shard {shard}" if grid.size("shard") > 1 else ""), *cells)
    if len(rows) > MOST_DRAWN:
        table.add_row(f"… {len(rows) - MOST_DRAWN} more")
    return table


def _cell(grid: Grid, place: Place) -> str:
    held = grid.experts(place)
    if not held:
        return str(place.rank)
    copy = f" of copy {place.expert_data}" if grid.size("expert_data") > 1 else ""
    return f"{place.rank}: {_named(held)}{copy}"


def _named(experts: range) -> str:
    return f"expert {experts[0]}" if len(experts) == 1 else f"experts {experts[0]}–{experts[-1]}"


def _axis_table(grid: Grid) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("axis", "ranks", "the first of them", "what they exchange"):
        table.add_column(name)
    for axis, what in _AXES.items():
        if grid.size(axis) > 1:
            first = lines(grid.ranks, axis)[0]
            shown = ", ".join(map(str, first[:8])) + (", …" if len(first) > 8 else "")
            table.add_row(axis.replace("_", " "), str(len(first)), shown, what)
    return table


def _as_json(grid: Grid) -> dict[str, Any]:
    return {
        "config": grid.name,
        "world": len(grid.ranks),
        "axes": {axis: grid.size(axis) for axis in _AXES},
        "ranks": [asdict(place) | {"experts": list(grid.experts(place))} for place in grid.ranks],
        "groups": {axis: [list(line) for line in lines(grid.ranks, axis)] for axis in _AXES},
    }


def _draw(grid: Grid, path: Path) -> None:
    """Stages side by side; in each a row for the ranks of one tensor-parallel group; a colour for each expert part."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch
    except ImportError:
        raise UserError("--picture needs matplotlib; pip install 'wastenot[viz]'") from None
    if len(grid.ranks) > MOST_DRAWN:
        raise UserError(f"--picture: {len(grid.ranks)} ranks are too many to draw; use --json, or {MOST_DRAWN} at most")
    stages, tensor = grid.size("pipeline"), grid.size("tensor")
    rows = grid.size("data") * grid.size("shard")
    wide, gap = 1.9, 0.7
    width, height = stages * tensor * wide + (stages - 1) * gap + 1.6, rows * 0.95 + 1.1
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set_xlim(0, width)
    panel.set_ylim(0, height)
    panel.axis("off")
    colours = [value for name, value in LIGHT.items() if name.startswith("run-")]
    for place in grid.ranks:
        row = place.data * grid.size("shard") + place.shard
        x = 1.4 + place.pipeline * (tensor * wide + gap) + place.tensor * wide
        y = height - 1.5 - row * 0.95
        colour = colours[place.expert % len(colours)] if grid.experts(place) else LIGHT["forward"]
        panel.add_patch(
            FancyBboxPatch((x, y), wide - 0.2, 0.75, boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec="none")
        )
        middle = x + (wide - 0.2) / 2
        held = grid.experts(place)
        panel.text(middle, y + (0.48 if held else 0.37), f"rank {place.rank}", ha="center", va="center", color="white")
        if held:
            panel.text(middle, y + 0.22, _named(held), ha="center", va="center", color="white", fontsize=8)
        if place.tensor == 0 and place.pipeline == 0:
            name = f"data {place.data}" + (f"\nshard {place.shard}" if grid.size("shard") > 1 else "")
            panel.text(1.25, y + 0.37, name, ha="right", va="center", color=LIGHT["faint"], fontsize=9)
        if row == 0 and tensor > 1:
            panel.text(middle, y + 0.86, f"tensor {place.tensor}", ha="center", color=LIGHT["faint"], fontsize=9)
        if row == 0 and place.tensor == 0 and stages > 1:
            panel.text(x, height - 0.4, f"stage {place.pipeline}", color=LIGHT["ink"], weight="bold")
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130, format="png")
