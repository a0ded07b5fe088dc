"""An answer of the planner for people, in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..parallel.lynx.question import Question
from ..parallel.lynx.trace import spread
from .lynx_compare import REFERENCE, Policy, ratio
from .lynx_figures import Figures, StageFigures, layout_line, model_line
from .report.formats import NONE, brief, count, decimals, percent, size

_ROWS = 16
"""Stages that are shown, evenly spread."""
_WIDTH = 120
"""Columns where output is no terminal."""


def show(question: Question, figures: Figures, policies: Sequence[Policy], origin: str) -> None:
    """Prints all of it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(Text(model_line(question), "bold"), soft_wrap=True)
    console.print(Text(layout_line(question, origin)), soft_wrap=True)
    console.print()
    console.print(_headline(question, figures))
    console.print(_stages(question, figures))
    for note in dict.fromkeys(stage.note for stage in figures.stages if stage.note):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    console.print(_policies(question, policies))


def headline(question: Question, figures: Figures) -> list[tuple[str, str]]:
    """Names and values of what is asked for first."""
    routing = figures.routing
    rows = [
        ("step", brief(figures.step_seconds)),
        ("tokens/s/device", count(figures.tokens_per_second_per_device)),
        ("MFU", percent(figures.mfu)),
        ("exposed communication", _part(figures.exposed_communication_seconds, figures)),
        ("exposed recompute", _part(figures.exposed_recompute_seconds, figures)),
        ("hidden recompute", brief(figures.hidden_recompute_seconds)),
        ("peak memory", f"{size(figures.peak)} of {size(question.bytes)}, rank {figures.fullest}"),
        ("", in_words(figures.components[figures.fullest])),
        ("the step goes to", ", ".join(f"{name} {percent(part)}" for name, part in figures.waste.items() if part)),
    ]
    if routing is not None:
        rows.append(("routing", routing_in_words(figures)))
    return rows


def routing_in_words(figures: Figures) -> str:
    """The skew and what it does."""
    routing = figures.routing
    if routing is None:
        return "no experts"
    dropped = f", {percent(routing.dropped)} of routes dropped" if routing.dropped else ""
    return f"{routing.skew}: the fullest rank receives {decimals(routing.fullest_to_mean, 2)} times the mean{dropped}"


def in_words(components: Mapping[str, int]) -> str:
    """Bytes by name, the largest first."""
    return ", ".join(f"{name} {size(value)}" for name, value in sorted(components.items(), key=lambda each: -each[1]))


def _part(seconds: float, figures: Figures) -> str:
    return f"{brief(seconds)}, {percent(seconds / figures.step_seconds)} of the step"


def _headline(question: Question, figures: Figures) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in headline(question, figures):
        table.add_row(name, Text(value))
    return table


def _stages(question: Question, figures: Figures) -> Table:
    stages = [figures.stages[i] for i in spread(len(figures.stages), _ROWS)]
    left_out = len(figures.stages) - len(stages)
    title = "plan by stage, seconds per micro-batch" + (
        f" ({left_out} of {len(figures.stages)} left out)" if left_out else ""
    )
    table = _table(title)
    has_chunks = question.layout.chunks > 1
    for name in stage_headings(has_chunks):
        table.add_column(name, justify="right", overflow="fold")
    for stage in stages:
        table.add_row(*stage_row(stage, has_chunks))
    return table


def stage_headings(has_chunks: bool) -> list[str]:
    """Of `stage_row`."""
    names = ["rank", *(["chunk"] if has_chunks else []), "layers", "in flight", "kept", "windows", "demand"]
    return [*names, "kept bytes", "hidden", "exposed", "peak", "gap", "search"]


def stage_row(stage: StageFigures, has_chunks: bool) -> list[str]:
    """One stage's plan as text."""
    return [
        str(stage.rank),
        *([str(stage.chunk)] if has_chunks else []),
        str(stage.layers),
        str(stage.in_flight),
        str(stage.kept),
        str(stage.in_windows),
        str(stage.on_demand),
        size(stage.kept_bytes),
        brief(stage.hidden_seconds),
        brief(stage.exposed_seconds),
        size(stage.peak_bytes),
        percent(stage.gap),
        brief(stage.search_seconds),
    ]


POLICY_HEADINGS = ("policy", "step", f"of {REFERENCE}", "tokens/s/device", "MFU", "exposed", "hidden", "peak", "search")

_ON_THE_PAGE_ONLY = ("tokens/s/device", "MFU")


def policy_row(policy: Policy, policies: Sequence[Policy]) -> list[str]:
    """One policy as text; what it needs where it does not fit."""
    figures = policy.figures
    if figures is None:
        return [
            policy.name,
            "does not fit",
            *[""] * (len(POLICY_HEADINGS) - 4),
            f"needs {size(policy.needs_bytes)}",
            "",
        ]
    to_reference = ratio(policy, policies)
    return [
        policy.name,
        brief(figures.step_seconds),
        NONE if to_reference is None else f"{to_reference:.3f} ×",
        count(figures.tokens_per_second_per_device),
        percent(figures.mfu),
        brief(figures.exposed_recompute_seconds),
        brief(figures.hidden_recompute_seconds),
        size(figures.peak),
        brief(figures.search_seconds),
    ]


def _policies(question: Question, policies: Sequence[Policy]) -> Table:
    table = _table("recomputation policies, exposed and hidden seconds per step")
    shown = [i for i, name in enumerate(POLICY_HEADINGS) if name not in _ON_THE_PAGE_ONLY]
    for i in shown:
        table.add_column(POLICY_HEADINGS[i], justify="right" if i else "left", overflow="fold")
    for policy in policies:
        style = "bold" if policy.name == question.solver else "dim" if policy.figures is None else ""
        row = policy_row(policy, policies)
        table.add_row(*(row[i] for i in shown), style=style)
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
