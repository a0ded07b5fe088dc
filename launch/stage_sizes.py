"""What the cut of a pipeline goes by: parameters of each layer, those at the ends included. Torch-free."""

from __future__ import annotations

from ..moe.config import ModelConfig, RouterConfig
from ..moe.config_size import count_layer


def layer_sizes(model: ModelConfig, router: RouterConfig, vocabulary: int) -> list[int]:
    """Parameters of each layer; the first one's with the embedding, the last one's with the output layer."""
    sizes = [count_layer(model, router, layer)["total"] for layer in range(model.layers)]
    matrix = vocabulary * model.d_model
    sizes[0] += matrix
    sizes[-1] += 0 if model.tie_embeddings else matrix
    return sizes
