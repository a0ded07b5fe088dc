"""Our decoder as an engine uses it: built, evaluated, asked for a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ...moe.decoder import Decoder, build_decoder
from ...moe.generate import generate
from ...parallel.collectives import all_reduce
from ...parallel.expert import expert_parameter_names
from ...parallel.mesh import Mesh
from ...parallel.stages import Stages, lay_out
from ..config import TrainConfig
from ..evaluate import Evaluation, evaluate
from ..precision import compute_dtype, weight_dtype
from ..stage_sizes import layer_sizes
from .engine import Ground


def stages_of(config: TrainConfig, mesh: Mesh) -> Stages:
    """Which layers this rank holds of the model of `config`, whose vocabulary is known."""
    sizes = layer_sizes(config.model, config.router, config.model.vocab_size)
    return lay_out(config.parallel, sizes, mesh.pipeline.rank)


def new_decoder(ground: Ground) -> Decoder:
    """This rank's part of the model, with the weights of a new run: the same under every layout and engine."""
    config, mesh = ground.config, ground.mesh
    return build_decoder(
        config.model,
        config.router,
        mesh,
        seed=config.train.seed,
        dtype=weight_dtype(config.train.precision),
        piece_bytes=ground.piece_bytes,
        backend=config.kernels,
        stages=stages_of(config, mesh),
        compute_dtype=compute_dtype(config.train.precision),
        recompute=config.recompute,
    )


def evaluate_decoder(model: Decoder, ground: Ground, progress: Callable[[int, int], None]) -> Evaluation:
    """What `model` makes of the held-out text; all ranks take part."""
    config = ground.config
    return evaluate(
        model,
        ground.held_out,
        ground.mesh,
        seq_len=config.data.seq_len,
        batch=config.train.eval_batch,
        precision=config.train.precision,
        progress=progress,
    )


def generate_from(model: Decoder, config: TrainConfig, prompt: list[int], count: int) -> list[int]:
    """`prompt` and `count` tokens after it, drawn with the run's seed; all ranks take part."""
    model.eval()
    [tokens] = generate(model, [prompt], max_new_tokens=count, temperature=0.8, seed=config.train.seed)
    return tokens


def parameter_sizes(model: Decoder) -> list[tuple[bool, int]]:
    """Of each parameter of this rank: whether it is of its own experts, and how many numbers."""
    experts = expert_parameter_names(model)
    return [(name in experts, p.numel()) for name, p in model.named_parameters()]


def count_parameters(sizes: Iterable[tuple[bool, int]], mesh: Mesh) -> int:
    """Parameters of the whole model, from this rank's `parameter_sizes`; all ranks take part."""
    here = sum(size * (mesh.expert.size if of_experts else 1) for of_experts, size in sizes)
    counted = torch.tensor([here], device=mesh.device)
    return int(all_reduce(counted, mesh.pipeline, "summary", mesh.recorder))
