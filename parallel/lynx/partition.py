"""Recomputation-aware cut of layers into pipeline stages (METHODS L6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .problem import Layer, Operator, Stage
from .solution import InfeasibleError, Solution
from .solve import solve


@dataclass(frozen=True)
class Extra:
    """What a stage has beside the activations and the work of its layers."""

    bytes: int = 0
    """Parameters, gradients, optimizer state, buffers, ..."""
    seconds: float = 0.0
    """Of an embedding, or of an output layer and its loss; forward and backward."""


@dataclass(frozen=True)
class Part:
    """A pipeline stage: its plan, and its time for one micro-batch."""

    stage: Stage
    solution: Solution
    seconds: float
    """Forward, backward and exposed recomputation."""


@dataclass(frozen=True)
class Partition:
    """All of them."""

    cut: tuple[int, ...]
    """Layers of each stage."""
    parts: tuple[Part, ...]
    moves: int
    """Layers that were moved from the equal cut."""

    @property
    def seconds(self) -> float:
        """Of the slowest stage."""
        return max(part.seconds for part in self.parts)


def plain_seconds(layer: Layer) -> float:
    """Of a layer's forward and backward, all communication exposed and nothing recomputed."""
    forward = sum(each.seconds for each in (*layer.operators, *layer.forward) if not _is_collective(each))
    return forward + sum(each.seconds for each in layer.backward)


def _is_collective(each: object) -> bool:
    # Its time in the forward is that of its window.
    return isinstance(each, Operator) and each.kind == "collective"


def partition(
    layers: Sequence[Layer],
    *,
    in_flight: Sequence[int],
    budget: int,
    extra: Callable[[Sequence[Layer], bool, bool], Extra] = lambda layers, is_first, is_last: Extra(),
    replay: bool = False,
    solver: str = "heu-mix",
    moves: int = 100,
) -> Partition:
    """Starts equal, and moves layers from the slowest stage toward a faster one as long as the slowest gets faster.

    `in_flight`: micro-batches, of each stage, whose number it gives; `budget`: bytes of each device; `extra`: of a
    stage by its layers and whether it is the first or the last; `moves`: at most. Raises ValueError for more stages
    than layers, and `InfeasibleError` where no cut that is tried fits everywhere.
    """
    num_stages = len(in_flight)
    if not 1 <= num_stages <= len(layers):
        raise ValueError(f"in_flight: {num_stages} stages for {len(layers)} layers; use 1 to {len(layers)}")
    solved: dict[object, Part | InfeasibleError] = {}

    def parts_of(cut: Sequence[int]) -> list[Part | InfeasibleError]:
        found, start = [], 0
        for number, size in enumerate(cut):
            own = tuple(layers[start : start + size])
            start += size
            key = (own, in_flight[number], number == 0, number + 1 == num_stages)
            if key not in solved:
                solved[key] = _solved(own, in_flight[number], budget, extra(own, key[2], key[3]), replay, solver)
            found.append(solved[key])
        return found

    each, more = divmod(len(layers), num_stages)
    cut = [each + (number < more) for number in range(num_stages)]
    parts = parts_of(cut)
    done = 0
    while done < moves:
        better = next((new for new in _moved(cut, parts) if _rank(parts_of(new)) < _rank(parts)), None)
        if better is None:
            break
        cut, parts = better, parts_of(better)
        done += 1
    fits = [part for part in parts if isinstance(part, Part)]
    if len(fits) < num_stages:
        short = [part for part in parts if isinstance(part, InfeasibleError)]
        smallest = max(part.smallest for part in short)
        raise InfeasibleError(smallest, budget, is_exact=False, note=f"cut into {cut} layers, {len(short)} do not fit")
    return Partition(tuple(cut), tuple(fits), done)


def _solved(
    layers: tuple[Layer, ...], in_flight: int, budget: int, extra: Extra, replay: bool, solver: str
) -> Part | InfeasibleError:
    stage = Stage(layers=layers, in_flight=in_flight, budget=budget, static=extra.bytes, replay=replay)
    try:
        solution = solve(stage, solver)
    except InfeasibleError as error:
        return error
    seconds = sum(map(plain_seconds, layers)) + extra.seconds + solution.outcome.exposed
    return Part(stage, solution, seconds)


def _moved(cut: Sequence[int], parts: Sequence[Part | InfeasibleError]) -> Iterator[list[int]]:
    """Cuts with one layer less in the slowest stage, or one that does not fit: toward the fastest first."""
    pace = [part.seconds if isinstance(part, Part) else float("inf") for part in parts]
    slowest = max(range(len(cut)), key=lambda number: (pace[number], cut[number]))
    if cut[slowest] == 1:
        return
    for faster in sorted(range(len(cut)), key=pace.__getitem__):
        if faster != slowest and pace[faster] < pace[slowest]:
            # Stages in between pass a layer on.
            new = list(cut)
            new[slowest] -= 1
            new[faster] += 1
            yield new


def _rank(parts: Sequence[Part | InfeasibleError]) -> tuple[int, int, float]:
    """The lower, the better: stages that do not fit, the bytes they need, and the slowest stage's seconds."""
    short = [part.smallest for part in parts if isinstance(part, InfeasibleError)]
    return len(short), max(short, default=0), max((p.seconds for p in parts if isinstance(p, Part)), default=0.0)
