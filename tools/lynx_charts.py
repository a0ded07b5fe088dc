"""Charts of the page about recomputation policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..parallel.lynx.memory_curve import Memory
from ..parallel.lynx.timeline import end_of
from .lynx_compare import Policy
from .lynx_figures import Figures
from .lynx_picture import COLOURS, lanes
from .report.formats import brief, size
from .report.markup import Html, figure, folded, join, legend, wide
from .report.palette import LIGHT, run_line
from .report.svg import FONT_POINTS, new_figure, plain_axes, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOES_TO = {
    "compute": "forward",
    "exposed recompute": "recomputation",
    "exposed communication": "hidden-communication",
    "pipeline warm-up": "warm-up",
    "pipeline waits": "waits",
    "pipeline cool-down": "cool-down",
    "gradient reduction": "gradient-reduction",
    "optimizer": "optimizer",
}
"""Colours of what a step goes to, from the axis out."""
HOLDS = {
    "weights": "forward",
    "gradients": "backward",
    "optimizer": "optimizer",
    "buffers": "gradient-reduction",
    "context and fragmentation": "padding",
    "activations": "rectified",
}
"""Colours of what a rank holds, from the axis out."""
_RANKS, _MICRO_BATCHES = 6, 8
"""Of timelines, at most."""


def where_time_goes(policies: Sequence[Policy]) -> Html:
    """A bar a policy: the seconds of a step by what they go to."""
    parts = {
        policy.name: {name: part * policy.figures.step_seconds for name, part in policy.figures.waste.items()}
        for policy in policies
        if policy.figures is not None
    }
    told = " ".join(
        f"{name}: {', '.join(f'{what} {brief(seconds)}' for what, seconds in of_policy.items() if seconds)}."
        for name, of_policy in parts.items()
    )
    drawing = _bars(policies, parts, GOES_TO, 1.0, "seconds of a step, mean over ranks", brief)
    there = {what for of_policy in parts.values() for what, seconds in of_policy.items() if seconds}
    return figure(
        "Where the time of a step goes",
        _boxes({what: colour for what, colour in GOES_TO.items() if what in there}),
        to_svg(drawing, "time", told),
    )


def what_is_held(policies: Sequence[Policy], budget: int) -> Html:
    """A bar a policy: what its fullest rank's peak is made of, and the budget."""
    parts = {policy.name: _held(policy.figures) for policy in policies if policy.figures is not None}
    told = " ".join(
        f"{name}: {', '.join(f'{what} {size(value)}' for what, value in of_policy.items() if value)}."
        for name, of_policy in parts.items()
    )
    drawing = _bars(policies, parts, HOLDS, 2**30, "GiB at the peak of the fullest rank", size, budget)
    axes = drawing.axes[0]
    axes.axvline(budget / 2**30, color=LIGHT["bad"], linewidth=1.1, linestyle=(0, (4, 3)))
    there = {what for of_policy in parts.values() for what, value in of_policy.items() if value}
    return figure(
        join(["What the fullest rank holds, and the budget of ", size(budget), " (dashed)"], ""),
        _boxes({what: colour for what, colour in HOLDS.items() if what in there}),
        to_svg(drawing, "held", f"{told} The budget is {size(budget)}."),
    )


def _held(figures: Figures) -> dict[str, int]:
    """Components under the names of HOLDS."""
    found = dict.fromkeys(HOLDS, 0)
    for name, value in figures.components[figures.fullest].items():
        last = name.rpartition(" ")[2]
        if name in ("context", "fragmentation"):
            found["context and fragmentation"] += value
        elif last in found:
            found[last] += value
        else:
            found["buffers"] += value
    return found


def _bars(
    policies: Sequence[Policy],
    parts: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, str],
    unit: float,
    label: str,
    shown: Callable[[float], str],
    limit: float | None = None,
) -> Figure:
    """Horizontal bars, the first policy on top; one that does not fit has none, and says so.

    unit: of the axis; shown: a sum in words, which stands beside the bar, or beyond `limit`.
    """
    drawing = new_figure(5.0, 0.36 * len(policies) + 0.55)
    axes = drawing.subplots()
    plain_axes(axes, grid=False)
    axes.grid(axis="x", color=LIGHT["rule"], linewidth=0.6)
    most = max([limit or 0.0, *(sum(of_policy.values()) for of_policy in parts.values())]) / unit
    style = {"va": "center", "fontsize": FONT_POINTS}
    for row, policy in enumerate(policies):
        if policy.name not in parts:
            text = f"does not fit: needs {size(policy.needs_bytes)}"
            axes.text(0.01 * most, row, text, color=LIGHT["faint"], **style)
            continue
        of_policy, left = parts[policy.name], 0.0
        for what, colour in colours.items():
            width = of_policy.get(what, 0.0) / unit
            axes.barh(row, width, 0.66, left, color=LIGHT[colour], edgecolor=LIGHT["paper"], linewidth=0.5)
            left += width
        beside = left if limit is None else most
        axes.text(beside + 0.015 * most, row, shown(sum(of_policy.values())), color=LIGHT["ink"], **style)
    axes.set_yticks(range(len(policies)), [policy.name for policy in policies])
    for name in axes.get_yticklabels():
        name.set_color(LIGHT["ink"])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(policies) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * most)
    axes.set_xlabel(label)
    return drawing


def memory_curves(policies: Sequence[Policy], budget: int) -> Html:
    """What the fullest rank of each policy holds over the step."""
    there = [(i, policy) for i, policy in enumerate(policies) if policy.answer is not None]
    drawing = new_figure(10.4, 2.9)
    axes = drawing.subplots()
    plain_axes(axes)
    top, told, names = budget, [], []
    for i, policy in there:
        assert policy.answer is not None and policy.figures is not None
        simulation, rank = policy.answer.simulation, policy.figures.fullest
        curve = Memory(simulation).curve(rank)
        static = simulation.work.ranks[rank].static_bytes
        seconds = [0.0, *curve.seconds.tolist(), simulation.seconds]
        held = [static, *curve.bytes.tolist(), int(curve.bytes[-1])]
        colour, dashes = run_line(i)
        axes.step(
            seconds,
            [value / 2**30 for value in held],
            where="post",
            color=LIGHT[colour],
            linestyle=dashes,
            linewidth=1.2,
        )
        names.append((f"{policy.name}, rank {rank}", f"border-top-color:var(--{colour});border-top-style:{dashes}"))
        told.append(f"{policy.name}: {size(policy.figures.peak)} at most, on rank {rank}.")
        top = max(top, *held)
    axes.axhline(budget / 2**30, color=LIGHT["bad"], linewidth=1.1, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1.08 * top / 2**30)
    axes.set_xlim(0, max(policy.answer.step_seconds for _, policy in there if policy.answer is not None))
    axes.set_xlabel("seconds since the step began")
    axes.set_ylabel("GiB held")
    return figure(
        f"Memory of the fullest rank over the step; dashed: the budget of {size(budget)}",
        legend(names, lines=True),
        wide(to_svg(drawing, "memory", " ".join(told))),
    )


def timelines(policies: Sequence[Policy], unfolded: str) -> Html:
    """What ranks do when, under each policy, on one axis of time; the policy `unfolded` is open."""
    there = [(policy.name, policy.answer.simulation) for policy in policies if policy.answer is not None]
    until = max(end_of(simulation, _MICRO_BATCHES) for _, simulation in there)
    parts, seen = [], set[str]()
    for i, (name, simulation) in enumerate(there):
        drawing, there_is = lanes(simulation, num_ranks=_RANKS, until=until)
        seen |= there_is
        told = f"Timeline under {name}; a step takes {brief(simulation.seconds)}."
        summary = f"{name}: {brief(simulation.seconds)} a step"
        parts.append(folded(summary, wide(to_svg(drawing, f"timeline-{i}", told)), unfolded=name == unfolded))
    drawn = {what: what.replace(" ", "-") for what in COLOURS if what in seen}
    return join([_boxes({**drawn, "idle": "idle"}), *parts])


def _boxes(colours: Mapping[str, str]) -> Html:
    return legend((what, f"background:var(--{colour})") for what, colour in colours.items())
