"""Shapes whose optimizer state `adapprox-memory` allocates, and the bytes that Adapprox must take for each.

The models are those of the paper (arXiv 2403.14958, section 4): GPT-2 with its output layer tied to the embedding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal

Shape = tuple[int, ...]
Shapes = Mapping[Shape, int]
"""How many parameters of each shape there are."""
Rank = Literal["k = 1", "k_max"]
"""The two ends of the paper's range: k_init, and a quarter of a matrix's smaller side."""

VOCABULARY, POSITIONS = 50257, 1024


def gpt2(width: int, layers: int) -> dict[str, Shape]:
    """GPT-2's parameters by name; matrices are [in, out], as its Conv1D has them."""
    vectors = {"bias": (width,), "weight": (width,)}
    layer: dict[str, Shape] = {
        **{f"{norm}.{name}": shape for norm in ("ln_1", "ln_2") for name, shape in vectors.items()},
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }
    return {
        "wte.weight": (VOCABULARY, width),
        "wpe.weight": (POSITIONS, width),
        **{f"h.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()},
        **{f"ln_f.{name}": shape for name, shape in vectors.items()},
    }


MODELS: Mapping[str, Shapes] = {
    "GPT-2 117M": Counter(gpt2(768, 12).values()),
    "experts 4 x 2048 x 768": {(4, 2048, 768): 1},
    "GPT-2 345M": Counter(gpt2(1024, 24).values()),
}


def expected_bytes(shape: Shape, rank: Rank, momentum: str) -> int:
    """State of one fp32 parameter: (m + n) k numbers a matrix, one a vector's entry, and the first moment.

    Beside them stand a count of steps, and of each matrix its rank and its last error.
    """
    numbers, counters = math.prod(shape), 4
    second = 4 * numbers
    *lead, last = shape
    if lead:
        matrices, m, n = math.prod(lead[:-1]), lead[-1], last
        second = 4 * matrices * (m + n) * (1 if rank == "k = 1" else min(m, n) // 4)
        counters += 12 * matrices
    scales = numbers // last * math.ceil(last / 128)
    first = {"fp32": 4 * numbers, "bf16": 2 * numbers, "int8": numbers + 4 * scales, "none": 0}
    return second + first[momentum] + counters
