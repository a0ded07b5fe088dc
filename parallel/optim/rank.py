"""How many columns a matrix's factors have (METHODS A3; arXiv 2403.14958, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

K_INIT = 1


def max_rank(rows: int, columns: int, limit: float | int) -> int:
    """Most columns: `limit` where it is an int, that part of the smaller side where it is a float; 1 at least."""
    smaller = min(rows, columns)
    wanted = limit if isinstance(limit, int) else math.floor(limit * smaller)
    return max(1, min(smaller, wanted))


def is_factored(rows: int, columns: int, limit: float | int) -> bool:
    """Whether factors of the largest rank are smaller than the second moment itself."""
    return (rows + columns) * max_rank(rows, columns, limit) < rows * columns


def growth(xi: float) -> int:
    """f(xi): columns to add where the relative error is `xi`; 6 at 0, 190 at 1."""
    return max(1, math.floor(200 / (1 + math.exp(-10 * xi + 2.5)) - 9))


def search(xi_c: Sequence[float], threshold: float, most: int) -> tuple[int, bool]:
    """Walks the schedule from `K_INIT` by the errors of ranks 1, 2, ... c.

    Returns the rank at which the error is within `threshold` or `most` is reached, and True; or the rank whose error
    must be known to go on, and False.
    """
    rank = min(K_INIT, most)
    while rank <= len(xi_c):
        # Written so that a NaN ends the search.
        if not xi_c[rank - 1] > threshold or rank == most:
            return rank, True
        rank = min(rank + growth(xi_c[rank - 1]), most)
    return rank, False
