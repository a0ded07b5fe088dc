"""Sections of the page: the plan as it is written, what names it, and what verification found."""

from __future__ import annotations

from importlib.metadata import version

from ...report.formats import NONE
from ...report.markup import Html, element, folded, join, table
from ...report.runs import finite
from .folder import Compression

LONG = 40
"""Lines of a plan that is folded."""


def plan_text(compression: Compression) -> Html | None:
    """The plan, the hashes of what it rests on and the versions; None where there is neither plan nor profile."""
    plan, profile = compression.plan, compression.profile
    if plan is None and profile is None:
        return None
    rows: list[list[object]] = []
    if plan is not None:
        rows.append(["plan", element("code", plan.hash), "of all decisions: equal for equal plans"])
        rows.extend([f"criterion for {name}", how, ""] for name, how in plan.criteria.items())
    base = plan.base if plan is not None else profile.base if profile is not None else ""
    rows.append(["checkpoint", element("code", base), "of the whole model that the plan is for"])
    if profile is not None:
        text = profile.calibration
        rows.append(["profile", element("code", profile.fingerprint), "of what was profiled, on what and how"])
        rows.append(["calibration text", element("code", text["fingerprint"]), f"{text['name']}, its tokens"])
    rows.append(["wastenot", version("wastenot"), "wrote this page"])
    if compression.verify:
        rows.append(["transformers", _transformers(compression), "checked the exported model"])
    parts: list[object] = [
        _disagreement(compression),
        table(["", "hash, score or version", ""], rows, label="Names", texts=3),
    ]
    if compression.plan_text:
        lines = compression.plan_text.count("\n")
        parts.append(folded("plan.yaml", element("pre", compression.plan_text), unfolded=lines <= LONG))
    return join(parts)


def _disagreement(compression: Compression) -> Html:
    """Says where plan and profile are not about one checkpoint."""
    plan, profile = compression.plan, compression.profile
    if plan is None or profile is None or plan.base == profile.base:
        return Html("")
    return element(
        "p",
        f"The plan is for checkpoint {plan.base}, the profile is of {profile.base}: what this page shows of layers and "
        "experts is not what the plan was decided by.",
        class_="warning",
    )


def verification(compression: Compression) -> Html | None:
    """Whether stock software computes what ours does; None where nobody checked."""
    found = compression.verify
    if not found:
        return None
    passed = bool(found.get("passed"))
    mark = element("span", "passed" if passed else "failed", class_="good" if passed else "bad")
    words = element(
        "p",
        "The exported model was loaded by transformers, as anybody would load it, and its outputs (logits) compared "
        "with what the model that it was made from computes without what was dropped.",
    )
    largest, allowed = finite(found.get("max_difference")), finite(found.get("allowed"))
    told = [f"the largest difference is {largest:.2g}" if largest is not None else "nothing was compared"]
    if allowed:
        told.append(f"of the largest output at most {allowed:.2g} may differ")
    told.append(f"transformers {_transformers(compression)}")
    items = [element("li", mark, f": {'; '.join(told)}.")]
    items += [element("li", str(problem)) for problem in found.get("problems") or []]
    rest = [[name, str(value)] for name, value in found.items() if name not in _TOLD]
    more = table(["", "found"], rest, label="Verification in detail", texts=2)
    return join([words, element("ul", *items, class_="checks"), folded("In detail", more) if rest else ""])


_TOLD = ("passed", "max_difference", "difference", "allowed", "problems", "version", "transformers")
"""What a sentence tells of a verification; the rest is a table."""


def _transformers(compression: Compression) -> str:
    """Version of the transformers that checked the export."""
    found = compression.verify
    return str(found.get("transformers") or found.get("version") or NONE)
