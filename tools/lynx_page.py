"""The page that compares recomputation policies."""

from __future__ import annotations

from collections.abc import Sequence

from ..parallel.lynx.question import Question
from .lynx_charts import memory_curves, timelines, what_is_held, where_time_goes
from .lynx_compare import Policy, ratio
from .lynx_figures import Figures, layout_line, model_line
from .lynx_terminal import POLICY_HEADINGS, in_words, policy_row, routing_in_words, stage_headings, stage_row
from .report.document import document, mark_of
from .report.formats import brief, count, percent, size
from .report.markup import Html, element, join, table, tile

GENERATOR = "wastenot simulate"
MARK = mark_of(GENERATOR)
"""By which a page is known as one that may be written anew."""


def make_page(question: Question, policies: Sequence[Policy], origin: str) -> Html:
    """The whole text of the page about the policies, of which the question's solver is one that fits."""
    own = next(policy for policy in policies if policy.name == question.solver)
    assert own.figures is not None, "there is an answer"
    sections = {
        "policies": ("Policies", _policies(question, policies)),
        "time": ("Time and memory", _charts(question, policies)),
        "timelines": ("Timelines", _timelines(question, policies)),
        "plan": (f"The plan of {question.solver}", _plan(question, own.figures)),
    }
    header = element(
        "header",
        element("h1", question.shape.name),
        element("p", model_line(question), class_="model"),
        element("p", layout_line(question, origin), class_="facts"),
        element("dl", *(tile(*each) for each in _tiles(question, policies, own)), class_="tiles"),
    )
    return document(f"{question.shape.name} – {GENERATOR}", GENERATOR, header, sections)


def _tiles(question: Question, policies: Sequence[Policy], own: Policy) -> list[tuple[str, str, str]]:
    """(title, value, what it stands beside)."""
    figures = own.figures
    assert figures is not None
    to_full = ratio(own, policies)
    step = figures.step_seconds
    return [
        ("step", brief(step), own.name if to_full is None else f"{own.name}, {to_full:.3f} × full"),
        ("tokens/s", count(figures.tokens_per_second_per_device), "per device"),
        ("MFU", percent(figures.mfu), "without recomputation"),
        ("exposed comm.", percent(figures.exposed_communication_seconds / step), "of the step"),
        (
            "exposed recompute",
            percent(figures.exposed_recompute_seconds / step),
            f"of the step; {brief(figures.hidden_recompute_seconds)} hidden",
        ),
        (
            "pipeline bubble",
            percent(sum(part for name, part in figures.waste.items() if name.startswith("pipeline"))),
            "of the step",
        ),
        ("peak memory", size(figures.peak), f"of {size(question.bytes)}, rank {figures.fullest}"),
    ]


def _policies(question: Question, policies: Sequence[Policy]) -> Html:
    rows = []
    for policy in policies:
        name, *cells = policy_row(policy, policies)
        rows.append([element("b", name) if policy.name == question.solver else name, *cells])
    words = element(
        "p",
        "Recomputation frees memory that kept activations take, for time that is exposed unless a window hides it. "
        "Hidden and exposed seconds are per step, means over the ranks.",
    )
    return join([words, table(POLICY_HEADINGS, rows, label="Policies")])


def _charts(question: Question, policies: Sequence[Policy]) -> Html:
    pair = element("div", where_time_goes(policies), what_is_held(policies, question.bytes), class_="charts")
    return join([pair, memory_curves(policies, question.bytes)])


def _timelines(question: Question, policies: Sequence[Policy]) -> Html:
    words = element(
        "p",
        "Compute above, communication below, for each rank; numbers are micro-batches, a prime for a further chunk. "
        "All timelines have one axis, so that lengths compare.",
    )
    return join([words, timelines(policies, question.solver)])


def _plan(question: Question, figures: Figures) -> Html:
    has_chunks = question.layout.chunks > 1
    rows = [stage_row(stage, has_chunks) for stage in figures.stages]
    notes = dict.fromkeys(stage.note for stage in figures.stages if stage.note)
    return join(
        [
            element("p", "Outputs of operators by where the backward has them from; seconds are per micro-batch."),
            table(stage_headings(has_chunks), rows, label="Plan by stage"),
            *(element("p", note, class_="facts") for note in notes),
            element("p", f"Rank {figures.fullest} at its peak: {in_words(figures.components[figures.fullest])}."),
            element("p", f"Routing {routing_in_words(figures)}.") if figures.routing is not None else "",
        ]
    )
