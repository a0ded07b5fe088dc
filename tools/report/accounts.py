"""The account of a run, added up from its lines of metrics, and whether it adds up to what it must."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...moe.accounts import added
from ...moe.ledger import SLOTS
from ...moe.router import capacity_of
from .formats import count
from .runs import Line, Run

OF_CHOICES = ("kept", "rectified", "dropped")
"""What becomes of the router's choices: adds up to tokens x top-k."""

OF_SLOTS = ("kept", "filled", "padding")
"""What becomes of slots: adds up to experts x capacity."""


@dataclass(frozen=True)
class Account:
    """Totals over the steps of a run that its lines of metrics count."""

    steps: int
    slots: Mapping[str, Sequence[int]]
    """For each of `moe.ledger.SLOTS`, one number per expert layer; empty lists where the model is dense."""
    slots_by_rank: Sequence[Sequence[Sequence[int]]] | None
    """[ranks][layers][SLOTS]; None where it was too much to write down, or the number of ranks changed."""
    slots_there_are: Sequence[int] | None
    """In each expert layer: experts x capacity x ranks x micro-batches. None without a capacity, or where unknown."""
    tokens: int
    """Over all ranks and steps."""
    top_k: int
    collectives: Mapping[str, Mapping[str, float]]
    """`calls`, `bytes`, `waited_seconds` and `hidden_seconds` for each kind, over all ranks."""
    sent_bytes_by_layer: Sequence[int] | None
    waited_seconds_by_layer: Sequence[float] | None
    sent_bytes_by_rank: Sequence[int] | None
    waited_seconds_by_rank: Sequence[float] | None
    recompute_hidden_seconds: float
    """Of recomputation while the rank communicated, over all ranks ..."""
    recompute_exposed_seconds: float
    """... and while it did not."""
    peak_bytes: int | None
    """Of the fullest rank in a step of the last plan; None without a plan."""
    budget_bytes: int | None
    """What it was planned for."""

    @property
    def num_layers(self) -> int:
        """Expert layers."""
        return len(self.slots["kept"])

    def total(self, *names: str) -> int:
        """The sum of `names` over all layers."""
        return sum(sum(self.slots[name]) for name in names)


@dataclass(frozen=True)
class Check:
    """One identity of the ledger."""

    identity: str
    holds: bool
    detail: str


def account_of(run: Run) -> Account | None:
    """The account of `run`; None where an earlier version wrote it, which kept none, or nothing is logged yet."""
    lines = ledger_lines(run)
    if not lines:
        return None
    slots = add_slots(lines)
    there_are = added([_slots_there_are(run, line) for line in lines])
    steps = sum(line["ledger_steps"] for line in lines)
    return Account(
        steps=steps,
        slots=slots,
        slots_by_rank=added([line.get("slots_by_rank") for line in lines]),
        # Of as many layers as were counted, or nothing is known.
        slots_there_are=there_are if there_are and len(there_are) == len(slots["kept"]) else None,
        tokens=steps * _tokens(run),
        top_k=run.get("router.top_k", 1),
        collectives=_add_collectives(lines),
        sent_bytes_by_layer=added([line.get("sent_bytes_by_layer") for line in lines]),
        waited_seconds_by_layer=added([line.get("waited_seconds_by_layer") for line in lines]),
        sent_bytes_by_rank=added([line.get("sent_bytes_by_rank") for line in lines]),
        waited_seconds_by_rank=added([line.get("waited_seconds_by_rank") for line in lines]),
        recompute_hidden_seconds=sum(line.get("recompute_hidden_seconds", 0.0) for line in lines),
        recompute_exposed_seconds=sum(line.get("recompute_exposed_seconds", 0.0) for line in lines),
        peak_bytes=lines[-1].get("peak_bytes"),
        budget_bytes=lines[-1].get("budget_bytes"),
    )


def ledger_lines(run: Run) -> list[Line]:
    """The lines of `run` that hold an account."""
    return [line for line in run.lines if "ledger_steps" in line]


def add_slots(lines: Iterable[Line]) -> dict[str, list[int]]:
    """For each of SLOTS, the sums of `lines` per layer."""
    return {name: added([line.get("slots", {}).get(name) for line in lines]) or [] for name in SLOTS}


def slots_of(run: Run, world: int) -> list[tuple[int, int]]:
    """(experts, slots of each) in every expert layer, per (emulated) rank in one micro-batch on `world` ranks.

    Empty without a capacity, or where the configuration is not known.
    """
    if run.parsed is None:
        return []
    tokens = _tokens(run) // run.parsed.train.accumulate // _blocks(run, world)
    counts = run.parsed.model.expert_counts.values()
    return [
        (experts, slots) for experts in counts if (slots := capacity_of(run.parsed.router, tokens, experts)) is not None
    ]


def checks(run: Run, account: Account) -> list[Check]:
    """The identities of the ledger, as far as the run wrote down what they need."""
    found: list[Check] = []
    numbers = run.layer_numbers(account.num_layers)
    if account.num_layers:
        choices = [account.tokens * account.top_k] * account.num_layers
        found.append(_whole("tokens × top-k", OF_CHOICES, account, choices, numbers))
    if account.num_layers and account.slots_there_are is not None:
        found.append(_whole("experts × capacity", OF_SLOTS, account, account.slots_there_are, numbers))
    if account.slots_by_rank is not None:
        found.append(_ranks(account.slots_by_rank, account, numbers))
    if account.sent_bytes_by_rank is not None:
        by_rank = sum(account.sent_bytes_by_rank)
        by_kind = int(sum(kind["bytes"] for kind in account.collectives.values()))
        told = f"{count(by_rank)} bytes" if by_rank == by_kind else f"{count(by_rank)} and {count(by_kind)}"
        found.append(Check("bytes sent by all ranks = bytes of all collectives", by_rank == by_kind, told))
    if account.num_layers and run.ledger.get("steps") == account.steps:
        differing = [name for name in SLOTS if list(account.slots[name]) != list(run.ledger["slots"][name])]
        told = f"they differ in {', '.join(differing)}" if differing else f"{count(account.steps)} steps"
        found.append(Check("the lines of metrics.jsonl add up to ledger.json", not differing, told))
    return found


def _tokens(run: Run) -> int:
    """Tokens of a step, over all ranks."""
    return run.get("train.batch", 0) * run.get("data.seq_len", 0)


def _blocks(run: Run, world: int) -> int:
    """Parts of a micro-batch that have slots of their own."""
    return run.get("router.emulate.sources") or world


def _slots_there_are(run: Run, line: Line) -> list[int] | None:
    """Slots of each expert layer in the steps that `line` counts."""
    world = run.world_at(line["step"])
    if world is None:
        return None
    times = line["ledger_steps"] * run.get("train.accumulate", 1) * _blocks(run, world)
    return [times * experts * slots for experts, slots in slots_of(run, world)] or None


def _add_collectives(lines: Iterable[Line]) -> dict[str, dict[str, float]]:
    kinds: dict[str, dict[str, float]] = {}
    for line in lines:
        for kind, values in line.get("collectives", {}).items():
            sums = kinds.setdefault(kind, {"calls": 0, "bytes": 0, "waited_seconds": 0.0, "hidden_seconds": 0.0})
            for name in sums:
                sums[name] += values.get(name, 0)
    return kinds


def _whole(
    whole: str, parts: Sequence[str], account: Account, expected: Sequence[int], numbers: Sequence[int]
) -> Check:
    """The check that `parts` are all there is, in every layer."""
    sums = [sum(account.slots[part][layer] for part in parts) for layer in range(len(numbers))]
    wrong = [layer for layer, (found, known) in enumerate(zip(sums, expected, strict=True)) if found != known]
    where = f"each of {len(numbers)} layers" if len(numbers) > 1 else f"layer {numbers[0]}"
    told = " or ".join(map(count, sorted(set(expected)))) + f" in {where}"
    if wrong:
        first, more = wrong[0], f", and {len(wrong) - 1} layers more" if len(wrong) > 1 else ""
        told = f"{count(sums[first])} instead of {count(expected[first])} in layer {numbers[first]}{more}"
    return Check(f"{' + '.join(parts)} = {whole}", not wrong, told)


def _ranks(slots_by_rank: Sequence[Sequence[Sequence[int]]], account: Account, numbers: Sequence[int]) -> Check:
    """Ranks add up to their layer, and each has as many choices and slots as the next."""
    wrong = [told for layer, number in enumerate(numbers) for told in _uneven(slots_by_rank, account, layer, number)]
    ranks = "1 rank" if len(slots_by_rank) == 1 else f"{len(slots_by_rank)} ranks"
    return Check("ranks have equal parts that add up to their layers", not wrong, wrong[0] if wrong else ranks)


def _uneven(
    slots_by_rank: Sequence[Sequence[Sequence[int]]], account: Account, layer: int, number: int
) -> Iterator[str]:
    rows = [dict(zip(SLOTS, rank[layer], strict=True)) for rank in slots_by_rank]
    for name in SLOTS:
        summed, known = sum(row[name] for row in rows), account.slots[name][layer]
        if summed != known:
            yield f"{count(summed)} {name} on the ranks, {count(known)} in layer {number}"
    for parts in (OF_CHOICES,) if account.slots_there_are is None else (OF_CHOICES, OF_SLOTS):
        sums = {sum(row[part] for part in parts) for row in rows}
        if len(sums) > 1:
            yield f"{' + '.join(parts)} from {count(min(sums))} to {count(max(sums))} in layer {number}"
