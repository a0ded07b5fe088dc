"""Section of the page: the ledger in numbers, and whether it adds up."""

from __future__ import annotations

from collections.abc import Sequence

from ...moe.ledger import SLOTS
from .accounts import OF_CHOICES, OF_SLOTS, Account, checks
from .formats import count, duration, percent, size
from .headline import Entry
from .markup import Html, element, folded, join, table
from .runs import Run

TITLES = {name: name.replace("_", " ") for name in SLOTS}
PARTS = {*OF_CHOICES, *OF_SLOTS}
"""Names that have a colour."""


def ledger(entries: Sequence[Entry]) -> Html:
    """Tables of every run that kept a ledger."""
    words = element(
        "p",
        "Kept, rectified and dropped count choices; kept, filled and padding count slots; unserved counts tokens; "
        "local rows are the rows that rectification computed on the tokens' own ranks.",
    )
    return join([words, *(_of_run(entry, several=len(entries) > 1) for entry in entries)])


def _of_run(entry: Entry, *, several: bool) -> Html:
    run, account = entry.run, entry.account
    heading = element("h3", run.name) if several else ""
    if account is None:
        why = "Its metrics hold no account." if run.lines else "Nothing logged yet."
        return join([heading, element("p", why, class_="nothing")])
    covered = f"Over {count(account.steps)} steps."
    if account.steps < run.steps:
        covered = f"Over {count(account.steps)} of {count(run.steps)} steps; no line of metrics tells of the others."
    parts = [heading, element("p", covered), _identities(run, account)]
    if account.num_layers:
        parts.append(_totals(account))
        parts.append(folded("By layer", _by_layer(run, account), unfolded=account.num_layers <= 12 and not several))
    if account.recompute_hidden_seconds + account.recompute_exposed_seconds:
        parts.append(_recomputation(run, account))
    parts.append(_by_rank(run, account))
    if account.collectives:
        parts.append(folded("Collectives", _collectives(run, account), unfolded=not several))
    return join(parts)


def _identities(run: Run, account: Account) -> Html:
    items = []
    for check in checks(run, account):
        mark = element("span", "holds" if check.holds else "broken", class_="good" if check.holds else "bad")
        items.append(element("li", mark, " ", element("b", check.identity), f": {check.detail}"))
    return element("ul", *items, class_="checks")


def _totals(account: Account) -> Html:
    """All layers together, with the parts of their wholes."""
    choices, slots = account.total(*OF_CHOICES), account.total(*OF_SLOTS)
    tokens = account.tokens * account.num_layers
    rows = []
    for name in SLOTS:
        total = account.total(name)
        wholes = (
            choices if name in OF_CHOICES else 0,
            slots if name in OF_SLOTS else 0,
            0 if name in PARTS else tokens,
        )
        rows.append([_swatch(name), count(total), *(percent(total / whole) if whole else "" for whole in wholes)])
    headings = ["all layers", "total", "of choices", "of slots", "of tokens"]
    return table(headings, rows, label="Totals over all layers")


def _swatch(name: str) -> Html:
    box = "" if name not in PARTS else element("i", class_="box", style=f"background:var(--{name})", aria_hidden="true")
    return join([box, TITLES[name]], " ")


def _by_layer(run: Run, account: Account) -> Html:
    sent, waited = account.sent_bytes_by_layer, account.waited_seconds_by_layer
    numbers = run.layer_numbers(account.num_layers)
    rows = [
        [
            f"layer {number}",
            *(count(account.slots[name][layer]) for name in SLOTS),
            *([size(sent[layer])] if sent else []),
            *([duration(waited[layer])] if waited else []),
        ]
        for layer, number in enumerate(numbers)
    ]
    sums = [*([size(sum(sent))] if sent else []), *([duration(sum(waited))] if waited else [])]
    rows.append(["all", *(count(account.total(name)) for name in SLOTS), *sums])
    headings = ["", *TITLES.values(), *(["sent"] if sent else []), *(["waited"] if waited else [])]
    return table(headings, rows, label=f"Ledger of {run.name} by layer")


def _by_rank(run: Run, account: Account) -> Html:
    slots, sent, waited = account.slots_by_rank, account.sent_bytes_by_rank, account.waited_seconds_by_rank
    ranks = len(slots or sent or waited or [])
    if not ranks:
        return element("p", "Nothing by rank: the number of ranks changed.", class_="nothing")
    rows = []
    for rank in range(ranks):
        sums = [count(sum(column)) for column in zip(*slots[rank], strict=True)] if slots else []
        sent_here = [size(sent[rank])] if sent else []
        rows.append([f"rank {rank}", *sums, *sent_here, *([duration(waited[rank])] if waited else [])])
    headings = ["", *(TITLES.values() if slots else []), *(["sent"] if sent else []), *(["waited"] if waited else [])]
    inside = [table(headings, rows, label=f"Ledger of {run.name} by rank")]
    if slots and account.num_layers > 1:
        numbers = run.layer_numbers(account.num_layers)
        each = [
            [f"rank {rank}", f"layer {number}", *map(count, slots[rank][layer])]
            for rank in range(ranks)
            for layer, number in enumerate(numbers)
        ]
        headings = ["", "", *TITLES.values()]
        inside.append(folded("By rank and layer", table(headings, each, label="Ledger by rank and layer", texts=2)))
    return folded("By rank", *inside)


_OF_KIND = ("calls", "bytes", "waited_seconds", "hidden_seconds")


def _recomputation(run: Run, account: Account) -> Html:
    """What backward computed again, and the memory that it was for."""
    hidden, exposed = account.recompute_hidden_seconds, account.recompute_exposed_seconds
    headings = ["recomputation, over ranks", "hidden", "exposed", "part hidden"]
    row = [duration(hidden + exposed), duration(hidden), duration(exposed), percent(hidden / (hidden + exposed))]
    if account.budget_bytes is not None:
        headings += ["peak memory", "budget"]
        row += [size(account.peak_bytes), size(account.budget_bytes)]
    return table(headings, [row], label=f"Recomputation of {run.name}")


def _collectives(run: Run, account: Account) -> Html:
    rows = []
    for kind, values in sorted(account.collectives.items(), key=lambda item: -item[1].get("bytes", 0)):
        calls, num_bytes, waited, hidden = (values.get(name, 0) for name in _OF_KIND)
        each = size(num_bytes / calls if calls else None)
        rows.append([kind, count(calls), size(num_bytes), each, duration(waited), duration(hidden)])
    calls, num_bytes, waited, hidden = (
        sum(values.get(name, 0) for values in account.collectives.values()) for name in _OF_KIND
    )
    rows.append(["all", count(int(calls)), size(num_bytes), "", duration(waited), duration(hidden)])
    headings = ["sums over ranks", "calls", "bytes", "bytes / call", "exposed (waited)", "hidden"]
    return table(headings, rows, label=f"Collectives of {run.name}")
