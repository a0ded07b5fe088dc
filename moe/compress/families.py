"""What the supported families call their parts in transformers 5, and how they compute. Torch-free.

What they call them on disk, and which layers have experts: places.py, shapes.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["MODULES", "FamilyModules"]


@dataclass(frozen=True, kw_only=True)
class FamilyModules:
    """One `model_type` of config.json."""

    classes: str
    """How the names of its classes begin."""
    num_experts: str = "num_experts"
    """Field of its configuration with the number of experts."""
    feed_on_disk: str = "mlp"
    """What stands in names on disk for `mlp`, the feed-forward network of a layer with experts."""
    shared: str | None = None
    """The shared experts, which are one network."""
    shared_gate: str | None = None
    """A linear layer whose sigmoid is the weight of the shared experts."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    sees: Literal["all", "window", "types"] = "all"
    """Whether attention reaches back through the whole text, for `sliding_window` tokens where that is set, or as
    `layer_types` says."""
    smallest_group: int = 1
    """Experts that its router reads of each group, and so must find there."""


MODULES: dict[str, FamilyModules] = {
    "mixtral": FamilyModules(
        classes="Mixtral", num_experts="num_local_experts", feed_on_disk="block_sparse_moe", sees="window"
    ),
    "qwen2_moe": FamilyModules(
        classes="Qwen2Moe", shared="shared_expert", shared_gate="shared_expert_gate", sees="types"
    ),
    "qwen3_moe": FamilyModules(classes="Qwen3Moe", sees="window"),
    "olmoe": FamilyModules(classes="Olmoe"),
    "deepseek_v2": FamilyModules(classes="DeepseekV2", num_experts="n_routed_experts", shared="shared_experts"),
    "deepseek_v3": FamilyModules(
        classes="DeepseekV3",
        num_experts="n_routed_experts",
        shared="shared_experts",
        score="sigmoid",
        smallest_group=2,
    ),
}
