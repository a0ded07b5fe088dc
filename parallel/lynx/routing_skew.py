"""How unevenly tokens choose experts, and what that does to the rows that ranks send, receive and hold.

    uniform          every expert is chosen as often
    zipf:S           expert e is chosen in proportion to (e + 1)^-S, as `router.kind: skewed` draws it
    FILE             a recorded histogram: YAML or JSON, a list of counts, one for each expert

A token chooses an expert once at most, so that an expert's part of all routes is 1 / top_k at most: what is beyond
that goes to the others in proportion (ours; an approximation of drawing without replacement). Experts lie on ranks in
their order, rank r of G owning [r E/G, (r+1) E/G), so Zipf's hot experts are neighbours: its worst placement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml

from .cluster import Cluster, reach
from .layout import Layout
from .nearest import suggestion
from .shape import Experts
from .traffic import all_to_all_seconds


@dataclass(frozen=True, kw_only=True)
class Skew:
    """How often experts are chosen."""

    name: str = "uniform"
    exponent: float = 0.0
    """Of Zipf's law; 0 is uniform."""
    counts: tuple[float, ...] = ()
    """Of a recorded histogram; empty: `exponent` counts."""


UNIFORM = Skew()


def parse_skew(text: str) -> Skew:
    """The skew that a command line names. Raises ValueError in one line where it is none."""
    kind, colon, rest = text.partition(":")
    if text == "uniform":
        return UNIFORM
    if kind == "zipf" and colon:
        try:
            exponent = float(rest)
        except ValueError:
            exponent = -1.0
        if not 0 <= exponent < math.inf:
            raise ValueError(f"skew: {text!r}: {rest!r} is no exponent; use a number from 0 on, for example zipf:1.0")
        return Skew(name=text, exponent=exponent)
    path = Path(text)
    if not path.is_file():
        known = ("uniform", "zipf:1.0")
        raise ValueError(f"skew: {text!r} is no skew and no file of a histogram; {suggestion(text, known)}")
    try:
        counts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"skew: {text}: not YAML; write a list of counts, one for each expert") from None
    if not isinstance(counts, list) or not all(_is_count(count) for count in counts) or not sum(counts):
        raise ValueError(f"skew: {text}: no list of counts, one for each expert, of which one is positive")
    return Skew(name=f"recorded:{path.name}", counts=tuple(map(float, counts)))


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def shares(skew: Skew, experts: int, top_k: int) -> tuple[float, ...]:
    """Part of all routes that each expert gets; they sum to 1, and none is above 1 / top_k.

    Raises ValueError where a histogram is of another number of experts.
    """
    if skew.counts and len(skew.counts) != experts:
        raise ValueError(
            f"skew: {skew.name} is of {len(skew.counts)} experts, the model has {experts}; record one of this model"
        )
    weights = list(skew.counts) or [(e + 1) ** -skew.exponent for e in range(experts)]
    # Experts that got nothing take the overflow only where there is nobody else.
    smallest = min((weight for weight in weights if weight > 0), default=1.0) * 1e-9
    weights = [max(weight, smallest) for weight in weights] if _positive(weights) < top_k else weights
    limit, full = 1 / top_k, set[int]()
    while True:
        free = sum(weight for e, weight in enumerate(weights) if e not in full)
        left = 1 - limit * len(full)
        scale = left / free if free else 0.0
        beyond = {e for e, weight in enumerate(weights) if e not in full and weight * scale > limit * (1 + 1e-12)}
        if not beyond:
            return tuple(limit if e in full else weight * scale for e, weight in enumerate(weights))
        full |= beyond


def _positive(weights: Sequence[float]) -> int:
    return sum(weight > 0 for weight in weights)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one micro-batch of every rank makes of one MoE layer's exchange."""

    sent: tuple[float, ...]
    """Rows that one rank sends to each of the G, itself included; all ranks send alike."""
    dropped: float
    """Part of all routes that no slot was left for."""
    tokens: int
    """Of one rank."""
    experts: Experts

    @property
    def num_sent(self) -> int:
        """Rows that leave the permutation of one rank, for other ranks and its own experts."""
        return math.ceil(sum(self.sent) - 1e-6)

    @property
    def fullest(self) -> int:
        """Rows that the rank with the most receives."""
        return math.ceil(len(self.sent) * max(self.sent) - 1e-6)

    @property
    def mean(self) -> float:
        """Rows that a rank receives on average."""
        return sum(self.sent)

    def volumes(self, spans: Sequence[int], row_bytes: float) -> tuple[float, ...]:
        """Bytes over each link of the rank that is slowest there: the larger of what it sends and what it receives.

        `spans` as `cluster.reach` gives them for this group.
        """
        found = []
        for inner, outer in zip([1, *spans], spans, strict=False):
            most = 0.0
            for rank, rows in enumerate(self.sent):
                received = rows * (outer - inner)
                sent = self._within(rank, outer) - self._within(rank, inner)
                most = max(most, received, sent)
            found.append(most * row_bytes)
        return tuple(found)

    def merged_volumes(self, spans: Sequence[int], row_bytes: float) -> tuple[float, ...]:
        """As `volumes`, where a token crosses to each node once: to the rank there of its own number, which copies.

        A token's experts are taken to be drawn one by one, so that a node with the part p of all routes is left out
        with (1 - p)^k; group-limited routing bounds the number of nodes. Slots that stay empty cross too.
        """
        ranks, node = len(self.sent), spans[0]
        if ranks <= node:
            return self.volumes(spans, row_bytes)
        rows = [math.fsum(self.sent[first : first + node]) for first in range(0, ranks, node)]
        crossing = self._crossing(rows)
        outside = ranks - node
        across = max(max(math.fsum(crossing) - own, own * outside / node) for own in crossing)
        # Inside: rows of the node's own tokens, and those that came from outside, but for what lands where it stays.
        arriving = max(self.sent) * (node - 1) * (1 + outside / node)
        leaving = max(rows) * (node - 1) / node * (1 + outside / node)
        shares = [(outer - inner) / outside for inner, outer in pairwise(spans)]
        return (max(arriving, leaving) * row_bytes, *(across * share * row_bytes for share in shares))

    def _crossing(self, rows: Sequence[float]) -> list[float]:
        """Of one rank's tokens, those with an expert on each node, which `rows` rows go to."""
        routes, k, experts = self.tokens * self.experts.top_k, self.experts.top_k, self.experts
        found = [self.tokens * (1 - max(0.0, 1 - row / routes) ** k) for row in rows]
        limit = math.ceil(experts.top_groups * max(1, len(rows) / experts.groups)) if experts.groups > 1 else len(rows)
        return [tokens * min(1.0, self.tokens * limit / math.fsum(found)) for tokens in found]

    def _within(self, rank: int, span: int) -> float:
        """Rows for the `span` ranks around `rank`."""
        first = rank // span * span
        return math.fsum(self.sent[first : first + span])


def load_of(experts: Experts, layout: Layout, skew: Skew = UNIFORM) -> Load:
    """Rows by rank where every rank routes its tokens of a micro-batch with this skew.

    Raises ValueError where the skew is of another model.
    """
    routes = layout.local_tokens * experts.top_k
    rows = [routes * share for share in shares(skew, experts.experts, experts.top_k)]
    if layout.capacity_factor is not None:
        # METHODS R2: per source rank and expert.
        slots = math.ceil(experts.top_k * layout.capacity_factor * layout.local_tokens / experts.experts)
        kept = [min(row, slots) for row in rows]
    else:
        slots, kept = 0, rows
    dropped = max(0.0, 1 - math.fsum(kept) / routes)
    placed = [float(slots)] * len(rows) if layout.padded else kept
    own = experts.experts // layout.expert
    sent = tuple(math.fsum(placed[rank * own : (rank + 1) * own]) for rank in range(layout.expert))
    return Load(sent=sent, dropped=dropped, tokens=layout.local_tokens, experts=experts)


def exchange_seconds(cluster: Cluster, layout: Layout, load: Load, row_bytes: float) -> float:
    """Of one all-to-all of `load`: dispatch, combine, or the gradient of either."""
    if layout.expert == 1:
        return 0.0
    spans = reach(cluster, layout.expert_group)
    volumes = load.merged_volumes if layout.merged_dispatch else load.volumes
    return all_to_all_seconds(cluster, layout.expert_group, volumes(spans, row_bytes))
