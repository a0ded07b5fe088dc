"""A mixed-integer linear program, row by row, and HiGHS to solve it. Knows nothing of recomputation."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

Sum = dict[int, float]
"""A linear expression: coefficient by variable."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what HiGHS 1.12 prints on its own, past its switch for output; it would stand in the middle of JSON."""
    sys.stdout.flush()
    saved = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


@dataclass(frozen=True)
class Answer:
    """What HiGHS found."""

    values: np.ndarray | None
    """Of each variable; None where it found no point."""
    bound: float
    """No point has an objective below; infinite where there is no point at all."""
    is_done: bool
    """Whether it ended by itself and not by the time limit."""


@dataclass
class Program:
    """Minimises `cost` over variables in [0, upper], under rows `low <= sum <= high`."""

    upper: list[float] = field(default_factory=list)
    integral: list[int] = field(default_factory=list)
    cost: Sum = field(default_factory=dict)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    entries: list[tuple[list[int], list[float]]] = field(default_factory=list)

    def variable(self, *, upper: float = 1.0, is_integral: bool = True) -> int:
        """A new one; binary by default."""
        self.upper.append(upper)
        self.integral.append(int(is_integral))
        return len(self.upper) - 1

    def row(self, terms: Mapping[int, float], *, low: float = -np.inf, high: float = np.inf) -> None:
        """One more constraint."""
        self.entries.append((list(terms), list(terms.values())))
        self.low.append(low)
        self.high.append(high)

    def solve(self, *, time_limit: float, gap: float = 0.0) -> Answer:
        """Seconds at most, and the relative gap at which to stop."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        size = len(self.upper)
        cost = np.zeros(size)
        cost[list(self.cost)] = list(self.cost.values())
        starts = np.cumsum([0, *(len(columns) for columns, _ in self.entries)])
        columns = np.array([each for row, _ in self.entries for each in row], dtype=np.int32)
        numbers = np.array([each for _, row in self.entries for each in row], dtype=np.float64)
        matrix = csr_array((numbers, columns, starts.astype(np.int32)), shape=(len(self.entries), size))
        # scipy's stubs allow numbers only.
        bounds = Bounds(0.0, np.array(self.upper))  # pyright: ignore[reportArgumentType]
        rows = LinearConstraint(matrix, np.array(self.low), np.array(self.high))  # pyright: ignore[reportArgumentType]
        options = {"time_limit": time_limit, "mip_rel_gap": gap}
        with _quiet():
            found = milp(cost, integrality=np.array(self.integral), bounds=bounds, constraints=rows, options=options)
        # Presolve does not tell infeasible from unbounded, which nothing here is.
        if found.status == 2 or "infeasible" in found.message.lower():
            return Answer(None, np.inf, True)
        bound = found.mip_dual_bound
        if bound is None or not np.isfinite(bound):
            # Where nothing is left to branch on, HiGHS gives none.
            bound = found.fun if found.status == 0 else -np.inf
        return Answer(found.x, float(bound), found.status == 0)
