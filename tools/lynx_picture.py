"""The picture of a simulated pipeline: what every rank does when, and what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..launch.errors import UserError
from ..parallel.lynx.memory_curve import Memory
from ..parallel.lynx.simulate import Simulation
from ..parallel.lynx.timeline import Block, end_of, timeline
from ..parallel.lynx.trace import spread
from ..parallel.lynx.where_time_goes import rank_times
from .output import replacing
from .report.formats import count, percent, size
from .report.palette import LIGHT
from .report.svg import FONT_POINTS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    what: LIGHT[what.replace(" ", "-")]
    for what in (
        "forward",
        "backward",
        "input gradient",
        "weight gradient",
        "recomputation",
        "hidden recomputation",
        "communication",
        "hidden communication",
        "gradient reduction",
        "optimizer",
    )
}
"""Of what is drawn, in the order of the legend."""
DARK = {"forward", "backward", "input gradient", "recomputation", "communication", "gradient reduction"}
"""What carries white letters."""
THIN = {"recomputation", "hidden recomputation", "communication", "hidden communication"}
"""What would vanish behind a light edge."""
COMPUTE, COMMUNICATION = (0.32, 0.60), (0.08, 0.20)
"""Bottom and height of a rank's streams, in its lane of height 1."""
INCHES = 12.0
"""Width of the picture."""
IDLE = LIGHT["idle"]


def draw(
    simulation: Simulation,
    path: Path,
    *,
    num_ranks: int = 8,
    num_micro_batches: int = 16,
    budget_bytes: int | None = None,
) -> None:
    """Writes `path`, PNG or SVG by its ending.

    num_ranks: at most so many, evenly spread, with the first and the last; num_micro_batches: the picture ends where
    the first so many do; budget_bytes: a line at what a device has. Raises UserError where matplotlib is not installed,
    the ending is another one, or the file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'wastenot[viz]'") from None
    check_picture(path)
    ranks = spread(simulation.schedule.num_ranks, num_ranks)
    until = end_of(simulation, num_micro_batches)
    shown = {rank: timeline(simulation, rank, until=until) for rank in ranks}
    unit, factor = _unit(until)
    lanes, curves = 0.62 * len(ranks), 1.9
    figure = Figure(figsize=(INCHES, lanes + curves + 1.7), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[lanes, curves])
    memory = Memory(simulation)
    _lanes(upper, shown, factor, until)
    _beside_lanes(upper, simulation, memory, ranks)
    _memory(lower, memory, ranks, factor, budget_bytes)
    rest = "" if until == simulation.seconds else f"; the step goes on to {factor * simulation.seconds:.4g} {unit}"
    lower.set_xlabel(f"{unit} since the step began{rest}")
    lower.set_xlim(0, factor * until)
    upper.tick_params(axis="x", labelbottom=False)
    upper.set_title(_title(simulation), loc="left", fontsize=10)
    _legend(figure, shown)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lynx"}), replacing(path) as beside:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(beside, dpi=130, format=path.suffix[1:], metadata=metadata)


def check_picture(path: Path) -> None:
    """Raises UserError where the ending of `path` is of no picture that can be drawn."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{path}: a picture is a .png or an .svg; name one")


def lanes(simulation: Simulation, *, num_ranks: int, until: float) -> tuple[Figure, set[str]]:
    """What at most `num_ranks` ranks do from the beginning to `until` seconds, where the axis ends, for a page; and the
    keys of COLOURS that are in it."""
    ranks = spread(simulation.schedule.num_ranks, num_ranks)
    shown = {rank: timeline(simulation, rank, until=until) for rank in ranks}
    unit, factor = _unit(until)
    figure = new_figure(INCHES, 0.62 * len(ranks) + 0.5)
    axes = figure.subplots()
    axes.set_facecolor("none")
    _lanes(axes, shown, factor, until)
    bubble = rank_times(simulation).bubble / simulation.seconds
    for lane, rank in enumerate(ranks):
        waits = percent(float(bubble[rank]))
        axes.text(
            1.008, lane, f"bubble {waits}", transform=axes.get_yaxis_transform(), fontsize=FONT_POINTS, va="center"
        )
    axes.set_xlim(0, factor * until)
    axes.set_xlabel(f"{unit} since the step began")
    for text in (*axes.texts[-len(ranks) :], *axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label):
        text.set(color=LIGHT["faint"], fontsize=FONT_POINTS)
    axes.spines["bottom"].set_color(LIGHT["rule"])
    axes.tick_params(axis="x", color=LIGHT["rule"])
    return figure, {block.what for blocks in shown.values() for block in blocks}


def _title(simulation: Simulation) -> str:
    schedule, times = simulation.schedule, rank_times(simulation)
    unit, factor = _unit(simulation.seconds)
    chunks = f" x {schedule.num_chunks} chunks" if schedule.num_chunks > 1 else ""
    waits = percent(float(times.bubble.mean()) / simulation.seconds)
    return (
        f"{schedule.name}, {_many(schedule.num_ranks, 'rank')}{chunks}, "
        f"{_many(schedule.num_micro_batches, 'micro-batch', 'es')}: {factor * simulation.seconds:.4g} {unit} a step, "
        f"{waits} of it in bubbles"
    )


def _many(number: int, what: str, ending: str = "s") -> str:
    return f"{count(number)} {what}{ending if number > 1 else ''}"


def _unit(seconds: float) -> tuple[str, float]:
    """A unit in which `seconds` is a number to read, and how many of it make a second."""
    return ("s", 1.0) if seconds >= 2 else ("ms", 1e3) if seconds >= 2e-3 else ("µs", 1e6)


def _lanes(axes: Any, shown: dict[int, list[Block]], factor: float, until: float) -> None:
    """A lane for each rank, the first on top."""
    for lane, blocks in enumerate(shown.values()):
        for bottom, height in (COMPUTE, COMMUNICATION):
            axes.broken_barh([(0, factor * until)], (lane - 0.5 + 1 - bottom - height, height), facecolors=IDLE)
        # A reduction goes on beside communication, and lies below it.
        for what in sorted(COLOURS, key="gradient reduction".__ne__):
            for row in (-1, 0, 1):
                bars = [block for block in blocks if block.what == what and block.row == row]
                if bars:
                    spans = [(factor * block.start, factor * (block.end - block.start)) for block in bars]
                    edge = COLOURS[what] if what in THIN else LIGHT["paper"]
                    style = {"facecolors": COLOURS[what], "edgecolor": edge, "linewidth": 0.5}
                    axes.broken_barh(spans, _place(lane, bars[0]), **style)
        for block in blocks:
            _number(axes, lane, block, factor, until)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_yticks(range(len(shown)), [f"rank {rank}" for rank in shown])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _place(lane: int, block: Block) -> tuple[float, float]:
    """Top and height of a block; the vertical axis points down."""
    bottom, height = COMPUTE if block.stream == "compute" else COMMUNICATION
    top = lane + 0.5 - bottom - height
    if block.row < 0:
        return top, height
    return top + block.row * height / 2, height / 2


def _number(axes: Any, lane: int, block: Block, factor: float, until: float) -> None:
    """The micro-batch, where there is room for it; a prime for each chunk after the first."""
    if block.micro_batch < 0 or block.stream != "compute" or "recomputation" in block.what or block.end > until:
        return
    label = f"{block.micro_batch}" + "′" * block.chunk
    top, height = _place(lane, block)
    room = (block.end - block.start) / until * (INCHES - 1.9) * 72
    # Digits are about 0.64 of the font's size wide.
    size_there_is = min(7.0 if block.row < 0 else 5.5, room / (0.64 * len(label)))
    if size_there_is >= 4.5:
        axes.text(
            factor * (block.start + block.end) / 2,
            top + height / 2,
            label,
            fontsize=size_there_is,
            ha="center",
            va="center_baseline",
            color="white" if block.what in DARK else "black",
        )


def _beside_lanes(axes: Any, simulation: Simulation, memory: Memory, ranks: Sequence[int]) -> None:
    """Right of each lane the rank's bubble, and its most with the colour of its curve below."""
    bubble = rank_times(simulation).bubble / simulation.seconds
    across = axes.get_yaxis_transform()
    for lane, (rank, colour) in enumerate(zip(ranks, _shades(len(ranks)), strict=True)):
        text = f"bubble {percent(float(bubble[rank]))}\nat most {size(int(memory.peak_bytes[rank]))}"
        axes.text(1.045, lane, text, transform=across, fontsize=7.5, va="center", linespacing=1.4)
        axes.plot([1.012, 1.035], [lane + 0.16] * 2, transform=across, color=colour, lw=2.5, clip_on=False)


def _shades(number: int) -> list[Any]:
    """Colours of ranks' curves, the first darkest."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 * i / max(1, number - 1)) for i in range(number)]


def _memory(axes: Any, memory: Memory, ranks: Sequence[int], factor: float, budget_bytes: int | None) -> None:
    """What each rank holds over time."""
    simulation = memory.simulation
    most = max(int(memory.peak_bytes[list(ranks)].max()), budget_bytes or 0, 1)
    scale, unit = next((s, u) for s, u in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")) if most >= s)
    for rank, colour in zip(ranks, _shades(len(ranks)), strict=True):
        curve, static = memory.curve(rank), simulation.work.ranks[rank].static_bytes
        seconds = [0.0, *curve.seconds.tolist(), simulation.seconds]
        values = [static, *curve.bytes.tolist(), int(curve.bytes[-1])]
        axes.step([factor * s for s in seconds], [v / scale for v in values], where="post", color=colour, lw=1.3)
    if budget_bytes is not None:
        axes.axhline(budget_bytes / scale, color="#cc3311", lw=1.0, ls="dashed")
        across = axes.get_yaxis_transform()
        text = f"budget {size(budget_bytes)}"
        axes.text(1.012, budget_bytes / scale, text, transform=across, fontsize=7.5, va="center", color="#cc3311")
    axes.set_ylim(0, 1.08 * most / scale)
    axes.set_ylabel(f"held, {unit}")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, shown: dict[int, list[Block]]) -> None:
    """What there is to see, below."""
    from matplotlib.patches import Patch

    there = {block.what for blocks in shown.values() for block in blocks}
    handles = [Patch(facecolor=colour, label=what) for what, colour in COLOURS.items() if what in there]
    handles.append(Patch(facecolor=IDLE, edgecolor="#c9ced4", linewidth=0.5, label="idle"))
    columns = len(handles) if len(handles) < 8 else (len(handles) + 1) // 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
