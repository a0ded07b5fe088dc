"""Adam's second moment held as a low-rank product, and what a step needs of it, without forming it whole.

V = beta2 * max(Q U^T, 0) + (1 - beta2) * G^2        (METHODS A2; arXiv 2403.14958, algorithm 3)

Suffixes: b matrices, m rows, n columns, k rank, c columns of a product, r rows of a tile.
"""

from __future__ import annotations

from .naive import second_moment
from .vectorised import SecondMoment, Tile

__all__ = ["SecondMoment", "Tile", "second_moment"]
