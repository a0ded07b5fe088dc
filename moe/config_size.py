"""Parameters of a model, counted from its configuration alone. Torch-free."""

from __future__ import annotations

from .config import ModelConfig, RouterConfig


def count_parameters(model: ModelConfig, router: RouterConfig, vocab_size: int = 0) -> dict[str, int]:
    """`total` parameters, and the `active` ones that one token's forward pass uses (embeddings included).

    `vocab_size` stands in for `model.vocab_size` where that is 0. Raises ValueError where neither is known.
    """
    rows = model.vocab_size or vocab_size
    if not rows:
        raise ValueError("vocab_size: 0 takes the tokenizer's, which is not known here; give the number")
    embeddings = rows * model.d_model * (1 if model.tie_embeddings else 2)
    total = active = embeddings + model.d_model
    for layer in range(model.layers):
        of_layer = count_layer(model, router, layer)
        total += of_layer["total"]
        active += of_layer["active"]
    return {"total": total, "active": active}


def count_layer(model: ModelConfig, router: RouterConfig, layer: int) -> dict[str, int]:
    """The same of layer number `layer` alone, from 0."""
    always = _attention(model) + model.d_model
    if model.has_ffn(layer):
        always += model.d_model
    if model.is_dense(layer):
        always += swiglu(model.d_model, model.dense_width)
    if model.moe is None or not model.is_moe(layer):
        return {"total": always, "active": always}
    experts, expert = model.num_experts(layer), swiglu(model.d_model, model.moe.d_expert)
    always += model.d_model * experts + swiglu(model.d_model, model.moe.shared_experts * model.moe.d_expert)
    return {"total": always + experts * expert, "active": always + router.top_k * expert}


def swiglu(d_model: int, width: int) -> int:
    """Gate, up and down projections, without biases."""
    return 3 * d_model * width


def _attention(model: ModelConfig) -> int:
    """Projections of queries, keys, values and outputs, and the norms of queries and keys."""
    queries, keys = model.heads * model.head_width, model.num_kv_heads * model.head_width
    norms = {"none": 0, "head": 2 * model.head_width, "full": queries + keys}[model.qk_norm]
    return 2 * model.d_model * (queries + keys) + norms
