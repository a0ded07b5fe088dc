"""What each solver makes of a stage as the budget varies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .evaluate import evaluate
from .extremes import all_kept
from .opt import smallest
from .partition import plain_seconds
from .problem import Stage
from .solution import InfeasibleError, Solution
from .solve import solve


@dataclass(frozen=True)
class Row:
    """One budget."""

    budget: int
    """Bytes."""
    solutions: dict[str, Solution]
    """By solver; none of one that found nothing that fits."""
    seconds: dict[str, float]
    """Of a forward and a backward of the stage, with exposed recomputation, by solver."""
    full: float
    """Seconds of recomputing everything, whether it fits or not."""

    def speed_up(self, solver: str, over: str = "full") -> float | None:
        """Over another solver, or recomputing everything; None where either found nothing that fits."""
        base = self.full if over == "full" else self.seconds.get(over)
        return base / self.seconds[solver] if base is not None and solver in self.seconds else None


def budgets(stage: Stage, parts: Sequence[float], *, time_limit: float = 60.0) -> list[int]:
    """From the smallest in which the stage fits (0), as far as OPT finds it, to what keeps everything (1)."""
    least, most = smallest(stage, time_limit=time_limit).smallest, evaluate(stage, all_kept(stage)).peak
    return [round(least + part * (most - least)) for part in parts]


def sweep(stage: Stage, solvers: Sequence[str], sizes: Sequence[int], *, time_limit: float = 60.0) -> list[Row]:
    """One row for each budget of `sizes`. `time_limit`: seconds, of each search."""
    plain = sum(map(plain_seconds, stage.layers))
    full = solve(replace(stage, budget=1 << 62), "full")
    rows = []
    for budget in sizes:
        solutions = {}
        for solver in solvers:
            try:
                solutions[solver] = solve(replace(stage, budget=budget), solver, time_limit)
            except InfeasibleError:
                continue
        seconds = {solver: plain + solution.outcome.exposed for solver, solution in solutions.items()}
        rows.append(Row(budget, solutions, seconds, plain + full.outcome.exposed))
    return rows


def table(rows: Sequence[Row], solvers: Sequence[str], over: str = "full") -> str:
    """Speed-ups over recomputing everything, or over another solver, budget by budget."""
    lines = [f"GB, over {over:15}" + "".join(f"{solver:>16}" for solver in solvers)]
    for row in rows:
        ratios = (row.speed_up(solver, over) for solver in solvers)
        numbers = "".join(f"{'-':>16}" if ratio is None else f"{ratio:15.3f}x" for ratio in ratios)
        lines.append(f"{row.budget / 1e9:<24.2f}{numbers}")
    return "\n".join(lines)
