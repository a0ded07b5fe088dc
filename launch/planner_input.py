"""What a planner is told of a run: model, layout, optimizer and routing. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from ..parallel.lynx.layout import Layout, check
from ..parallel.lynx.nearest import nearest_divisor
from ..parallel.lynx.optimizer_state import Optimizer
from ..parallel.lynx.routing_skew import UNIFORM, Skew
from ..parallel.lynx.shape import Experts, ModelShape
from ..parallel.stages import lay_out
from .config import TrainConfig
from .expert_counts import unlike_layers
from .rules import tokenizer_size
from .stage_sizes import layer_sizes

_LOSS_CHUNK_BYTES, _TENSOR_LOSS_CHUNK_BYTES = 4 * 2**20, 32 * 2**20
"""Of logits at a time on a rank: `CHUNK_BYTES` of `kernels/cross_entropy` and, where tensor ranks share the vocabulary,
of `parallel/vocabulary.py`, which need torch."""


@dataclass(frozen=True, kw_only=True)
class PlannerInput:
    """A model, and how it would be trained where nothing else is said."""

    shape: ModelShape
    layout: Layout
    optimizer: Optimizer
    skew: Skew = UNIFORM
    config: TrainConfig | None = None
    """The run's own; None where it is no wastenot run."""
    schedule: str = "1f1b"
    cut: tuple[int, ...] | None = None
    """Layers of each stage; None: as equal as they can be."""


def from_config(config: TrainConfig, name: str = "model", ranks: int | None = None) -> PlannerInput:
    """What `config` trains, on `ranks` ranks or as many as its layout asks for.

    Raises ValueError where the batch does not fit so many ranks, or the configuration is of what is not modelled.
    """
    shape, layout = shape_of(config, name), layout_of(config, ranks)
    check(shape, layout)
    optimizer = config.optimizer
    rank = optimizer.apollo.rank if optimizer.name == "apollo" else optimizer.adapprox.max_rank
    momentum = optimizer.adapprox.momentum if optimizer.name == "adapprox" else "fp32"
    return PlannerInput(
        shape=shape,
        layout=layout,
        optimizer=Optimizer(name=optimizer.name, master=False, momentum=momentum, rank=rank),
        skew=_skew(config),
        config=config,
        schedule=config.parallel.schedule,
        cut=cut_of(config) if config.parallel.pipeline > 1 else None,
    )


def cut_of(config: TrainConfig) -> tuple[int, ...]:
    """Layers of each of the run's stages. Raises ValueError where there are more stages than layers."""
    sizes = layer_sizes(config.model, config.router, _vocabulary(config))
    return tuple(len(layers) for layers in lay_out(config.parallel, sizes, 0).layers)


def shape_of(config: TrainConfig, name: str = "model") -> ModelShape:
    """The model of a run.

    Raises ValueError where its layers are not of two kinds, or its vocabulary is not known before its tokenizer is.
    """
    model, moe = config.model, config.model.moe
    if differing := unlike_layers(model):
        raise ValueError(f"model.moe.per_layer: {differing}; dense ones and equal MoE ones alone are modelled")
    experts = None
    if moe is not None and model.expert_counts:
        experts = Experts(
            experts=moe.experts,
            top_k=config.router.top_k,
            d_expert=moe.d_expert,
            shared_width=moe.shared_experts * moe.d_expert,
            groups=config.router.groups,
            top_groups=config.router.top_groups,
        )
    dense = tuple(filter(model.is_dense, range(model.layers))) if experts is not None else ()
    return ModelShape(
        name=name,
        vocab=_vocabulary(config),
        d_model=model.d_model,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_width,
        d_ff=model.dense_width,
        experts=experts,
        dense_layers=dense,
        qk_norm=model.qk_norm,
        tied=model.tie_embeddings,
    )


def layout_of(config: TrainConfig, ranks: int | None = None) -> Layout:
    """How a run is laid out: weights and the residual stream are in fp32."""
    parallel, train = config.parallel, config.train
    readers = parallel.copies(ranks) * parallel.shard
    if train.precision == "fp64":
        raise ValueError("train.precision: fp64 is not modelled; use fp32 or bf16")
    portions = readers * train.accumulate
    if train.batch % portions:
        per_rank = train.batch // train.accumulate
        raise ValueError(
            f"train.batch: {train.batch} in {train.accumulate} micro-batches does not fit {readers} ranks; use "
            f"{nearest_divisor(per_rank, readers)} ranks"
        )
    return Layout(
        tensor=parallel.tensor,
        expert=parallel.expert,
        pipeline=parallel.pipeline,
        data=readers,
        sequence_parallel=parallel.tensor > 1,
        chunks=parallel.num_chunks,
        zero=3 if parallel.shard > 1 else 0,
        shard=parallel.shard if parallel.shard > 1 else 0,
        seq_len=config.data.seq_len,
        micro_batch=train.batch // portions,
        micro_batches=train.accumulate,
        compute=train.precision,
        residual="fp32",
        weights="fp32",
        capacity_factor=config.router.capacity_factor,
        padded=config.model.moe is not None and config.model.moe.dispatch == "padded",
        loss_chunk=_loss_chunk(_vocabulary(config), parallel.tensor),
        eager=True,
    )


def _loss_chunk(vocabulary: int, tensor: int) -> int:
    """Tokens whose logits exist at a time: tensor ranks take equally many of each rank's."""
    if tensor == 1:
        return max(1, _LOSS_CHUNK_BYTES // (4 * vocabulary))
    return tensor * max(1, _TENSOR_LOSS_CHUNK_BYTES // (4 * tensor * -(-vocabulary // tensor)))


def _vocabulary(config: TrainConfig) -> int:
    size = config.model.vocab_size or tokenizer_size(config.data.tokenizer)
    if size is None:
        raise ValueError(
            f"model.vocab_size: 0 takes that of {config.data.tokenizer}, which is not read here; set the number"
        )
    return size


def _skew(config: TrainConfig) -> Skew:
    router = config.router
    return Skew(name=f"zipf:{router.skew}", exponent=router.skew) if router.kind == "skewed" else UNIFORM
