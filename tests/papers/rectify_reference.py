"""The Rectify-Router one token at a time, straight from METHODS R1-R9 (arXiv 2402.12399).

Plain Python floats and loops, nothing of the library but its configuration: slow, and meant to be read beside the
equations. One call is one rank (or emulated rank) with its own tokens; R10 is the caller's loop over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from wastenot.moe.config import RouterConfig

Vector = list[float]
Expert = Callable[[Vector], Vector]

COUNTS = ("kept", "filled", "rectified", "dropped", "padding", "local_rows", "unserved")


@dataclass
class Token:
    """What became of one token; lists are by choice, best first, fill-in choices after the router's own."""

    experts: list[int]
    slots: list[int]
    """-1: none."""
    kinds: list[str]
    weights: list[float]
    """0 without a slot."""
    stand_in: int
    """-1: none."""
    stand_in_weight: float
    has_row: bool
    """Whether the stand-in is computed apart: it is not where it holds the token in a slot already (deviation: then
    its weight joins that slot's)."""

    @property
    def survivors(self) -> int:
        return sum(slot >= 0 for slot in self.slots)


@dataclass
class Rank:
    """One rank's routing."""

    tokens: list[Token]
    capacity: int | None
    num_experts: int

    def counts(self) -> dict[str, int]:
        """The ledger's columns, counted choice by choice."""
        kinds = [kind for token in self.tokens for kind in token.kinds]
        found = {name: kinds.count(name) for name in COUNTS}
        taken = found["kept"] + found["filled"]
        found["padding"] = 0 if self.capacity is None else self.num_experts * self.capacity - taken
        found["local_rows"] = sum(token.has_row for token in self.tokens)
        found["unserved"] = sum(token.survivors == 0 and token.stand_in < 0 for token in self.tokens)
        return found

    def taken(self) -> list[int]:
        """Slots taken per expert."""
        held = [e for token in self.tokens for e, slot in zip(token.experts, token.slots, strict=True) if slot >= 0]
        return [held.count(expert) for expert in range(self.num_experts)]


def route(x: Sequence[Vector], gate: Sequence[Vector], own: range, config: RouterConfig) -> Rank:
    """Routes the tokens `x` of a rank that owns the experts `own`; `gate` is W_g, a row per expert."""
    T, E, k = len(x), len(gate), config.top_k
    scores = [scores_of([dot(row, token) for row in gate], config.score) for token in x]
    probs = [[s / sum(of_token) for s in of_token] for of_token in scores]  # R1
    capacity = None
    if config.capacity_factor is not None:
        capacity = math.ceil(k * Fraction(str(config.capacity_factor)) * T / E)  # R2
    choices = [best(of_token, config.num_choices, config) for of_token in scores]
    in_order = order_of_priority(probs, config.priority)  # R3
    slots = [[-1] * config.num_choices for _ in range(T)]
    taken = [0] * E
    # R3 and R5: first choices of all, then second ones, and so on; fill-in choices are the last ranks.
    for rank in range(config.num_choices):
        for t in in_order:
            expert = choices[t][rank]
            if capacity is None or taken[expert] < capacity:
                slots[t][rank] = taken[expert]
                taken[expert] += 1
    stand_ins = [-1] * T
    rows = [False] * T
    if config.rectify.intra:
        stand_ins, rows = stand_in_experts(scores, choices, slots, in_order, own, config)  # R6, R9
    tokens = [
        token_of(scores[t], choices[t], slots[t], stand_ins[t], rows[t], config)  # R4, R6
        for t in range(T)
    ]
    return Rank(tokens, capacity, E)


def output(x: Sequence[Vector], rank: Rank, experts: Sequence[Expert]) -> list[Vector]:
    """y of every token: its experts' outputs, weighted."""
    ys = []
    for token, routed in zip(x, rank.tokens, strict=True):
        y = [0.0] * len(token)
        parts = list(zip(routed.experts, routed.weights, strict=True))
        if routed.stand_in >= 0:
            parts.append((routed.stand_in, routed.stand_in_weight))
        for expert, weight in parts:
            if weight:
                y = [total + weight * v for total, v in zip(y, experts[expert](token), strict=True)]
        ys.append(y)
    return ys


def scores_of(logits: Vector, score: str) -> Vector:
    """Softmax over all experts, or sigmoids."""
    if score == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in logits]
    largest = max(logits)
    powers = [math.exp(z - largest) for z in logits]
    return [p / sum(powers) for p in powers]


def best(scores: Vector, count: int, config: RouterConfig) -> list[int]:
    """The `count` best experts, ties to the lower index, within the best groups."""
    size = len(scores) // config.groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.groups)]
    worth = [sum(sorted((scores[e] for e in group), reverse=True)[:2]) for group in groups]
    chosen = sorted(range(len(groups)), key=lambda g: (-worth[g], g))[: config.top_groups]
    eligible = [e for g in chosen for e in groups[g]]
    return sorted(eligible, key=lambda e: (-scores[e], e))[:count]


def order_of_priority(probs: Sequence[Vector], priority: str) -> list[int]:
    """Tokens in the order in which they get slots (R3); probabilities compared at 12 bits of mantissa (deviation)."""
    if priority == "position":
        return list(range(len(probs)))

    def rounded(p: float) -> float:
        mantissa, exponent = math.frexp(p)  # in [0.5, 1): the leading bit, then the 12 that count
        return math.ldexp(math.floor(mantissa * 2**13 + 0.5), exponent - 13)

    return sorted(range(len(probs)), key=lambda t: (-rounded(max(probs[t])), t))


def stand_in_experts(
    scores: Sequence[Vector],
    choices: Sequence[list[int]],
    slots: Sequence[list[int]],
    in_order: Sequence[int],
    own: range,
    config: RouterConfig,
) -> tuple[list[int], list[bool]]:
    """Each token's stand-in (-1: none), and whether it is computed as a row of its own."""
    T = len(scores)
    local = [max(own, key=lambda e: (scores[t][e], -e)) for t in range(T)]
    survivors = [[e for e, slot in zip(choices[t], slots[t], strict=True) if slot >= 0] for t in range(T)]
    fewer_than = config.top_k if config.rectify.select == "any" else 1
    selected = [len(survivors[t]) < fewer_than for t in range(T)]
    wants_row = [t for t in in_order if selected[t] and local[t] not in survivors[t]]
    if config.rectify.capacity is not None:
        # R9: tokens that nobody serves come first, otherwise the order of R3.
        bound = min(T, math.ceil(Fraction(str(config.rectify.capacity)) * T))
        unserved_first = sorted(wants_row, key=lambda t: bool(survivors[t]))
        for t in unserved_first[bound:]:
            selected[t] = False
        wants_row = unserved_first[:bound]
    return [local[t] if selected[t] else -1 for t in range(T)], [t in wants_row for t in range(T)]


def token_of(
    p: Vector, choices: list[int], slots: list[int], stand_in: int, has_row: bool, config: RouterConfig
) -> Token:
    """Weights (R4; R6 where there is a stand-in) and kinds of one token's choices."""
    k, K = config.top_k, config.num_choices
    kept = [slot >= 0 for slot in slots]
    mass = sum(p[e] for e, has in zip(choices, kept, strict=True) if has)
    m = K - sum(kept)
    local = 0.0
    if stand_in >= 0:
        local = m * p[stand_in]
        total = mass + local
    elif K == 1:
        total = p[choices[0]]
    elif config.normalize == "top_k":
        total = sum(p[e] for i, e in enumerate(choices) if kept[i] or i < k)
    else:
        total = mass
    if config.normalize == "none" or total == 0:
        total = 1.0
    kinds = []
    for i, has in enumerate(kept):
        if i < k:
            kinds.append("kept" if has else "rectified" if stand_in >= 0 else "dropped")
        else:
            kinds.append("filled" if has else "spare")
    return Token(
        experts=choices,
        slots=slots,
        kinds=kinds,
        weights=[config.scale * p[e] / total if has else 0.0 for e, has in zip(choices, kept, strict=True)],
        stand_in=stand_in,
        stand_in_weight=config.scale * local / total,
        has_row=has_row,
    )


def swiglu(gate_up: Sequence[Vector], down: Sequence[Vector]) -> Expert:
    """down(silu(gate(x)) * up(x)); gate rows above up rows."""
    half = len(gate_up) // 2

    def expert(x: Vector) -> Vector:
        gates, ups = ([dot(row, x) for row in rows] for rows in (gate_up[:half], gate_up[half:]))
        hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gates, ups, strict=True)]
        return [dot(row, hidden) for row in down]

    return expert


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
