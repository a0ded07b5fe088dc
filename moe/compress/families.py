"""What the Hugging Face families call their parts, on disk and in transformers 5. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .plan import Shape

__all__ = ["FAMILIES", "Family", "shape_of"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of config.json."""

    classes: str
    """How the names of its classes in transformers begin."""
    num_experts: str = "num_experts"
    """Field of its configuration with the number of experts."""
    feed: str = "mlp"
    """The feed-forward network of a layer, on disk."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    """The three matrices of an expert, on disk."""
    shared: str | None = None
    """The shared experts, which are one network."""
    shared_gate: str | None = None
    """A linear layer whose sigmoid is the weight of the shared experts."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    sparse: Literal["all", "listed", "after"] = "all"
    """Layers with experts: all; as mlp_only_layers and decoder_sparse_step say; from first_k_dense_replace on."""
    sees: Literal["all", "window", "types"] = "all"
    """Whether attention reaches back through the text, for `sliding_window` tokens where that is set, or as
    `layer_types` says."""
    smallest_group: int = 1
    """Experts that its router reads of each group, and so must find there."""

    def expert(self, layer: int, expert: int, part: str) -> str:
        """Name on disk of a matrix, `part` being the family's `gate`, `up` or `down`."""
        return f"model.layers.{layer}.{self.feed}.experts.{expert}.{part}.weight"


FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        classes="Mixtral",
        num_experts="num_local_experts",
        feed="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
        sees="window",
    ),
    "qwen2_moe": Family(
        classes="Qwen2Moe", shared="shared_expert", shared_gate="shared_expert_gate", sparse="listed", sees="types"
    ),
    "qwen3_moe": Family(classes="Qwen3Moe", sparse="listed", sees="window"),
    "olmoe": Family(classes="Olmoe"),
    "deepseek_v2": Family(
        classes="DeepseekV2", num_experts="n_routed_experts", shared="shared_experts", sparse="after"
    ),
    "deepseek_v3": Family(
        classes="DeepseekV3",
        num_experts="n_routed_experts",
        shared="shared_experts",
        score="sigmoid",
        sparse="after",
        smallest_group=2,
    ),
}


def shape_of(config: Any, family: Family) -> Shape:
    """What a plan can cut of the model that `config`, of the family's class in transformers, describes."""
    layers = range(config.num_hidden_layers)
    if family.sparse == "listed":
        step = config.decoder_sparse_step
        sparse = [layer not in config.mlp_only_layers and (layer + 1) % step == 0 for layer in layers]
    elif family.sparse == "after":
        sparse = [layer >= config.first_k_dense_replace for layer in layers]
    else:
        sparse = [True for _ in layers]
    # DeepSeek-V2 may name groups and not use them.
    grouped = getattr(config, "topk_method", "group_limited_greedy") == "group_limited_greedy"
    groups = (getattr(config, "n_group", None) or 1) if grouped else 1
    return Shape(
        experts=tuple(getattr(config, family.num_experts) if has else 0 for has in sparse),
        dense=tuple(layer for layer, has in enumerate(sparse) if not has),
        top_k=config.num_experts_per_tok,
        groups=groups,
        top_groups=config.topk_group if groups > 1 else 1,
    )
