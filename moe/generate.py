"""Text from a model, token by token: prompts of any lengths in one batch, keys and values cached.

Generation is dropless whatever capacity the model was trained with: a token must not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.apply import free_gathered, seed_of
from ..parallel.mesh import Mesh
from ..parallel.stopwatch import Stopwatch
from .attention import KVCache
from .decoder import Decoder
from .layer import MoELayer


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    end_token: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, up to but without `end_token`, at most `max_new_tokens` of them.

    Sampled at `temperature` (0: the likeliest token) among the `top_k` likeliest tokens (0: all) that together make
    up `top_p` of the probability. Prompt number i has its own random stream, set by (seed, i): what else is in the
    batch does not change its draws.

    Where ranks share experts, layers or the storage of weights, all of them call this with the same arguments and get
    the same tokens.

    Raises ValueError where a prompt is empty or holds a token that the model does not know, or an option is outside
    its range.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, top_k)
    if not prompts:
        return []
    weight = next(model.parameters())
    device = weight.device
    padding_B, tokens_BS = _pad_left(prompts, device)
    B, S = tokens_BS.shape
    # Drawn ahead on the host: the same on every device, whatever the others in the batch do.
    uniform_BN = torch.stack([_stream(seed_of("generate", seed, row), max_new_tokens) for row in range(B)]).to(device)
    held, ranks = model.stages.held, model.mesh.tensor.size
    cache = KVCache.empty(model.config, padding_B, S + max_new_tokens, weight.dtype, held, ranks)
    mesh = _mesh_of(model)
    made: list[Tensor] = []
    ended_B = torch.zeros(B, dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            hidden_BSD = model(tokens_BS, cache).hidden_BSD
            if model.stages.has_last:
                logits_BV = model.logits(hidden_BSD[:, -1:])[:, 0]
                chosen_B = sample(logits_BV, uniform_BN[:, step], temperature, top_p, top_k)
            else:
                chosen_B = torch.empty(B, dtype=torch.int64, device=device)
            if mesh is not None:
                _take_from(model.stages.ranks[-1] * mesh.stage.size, chosen_B, mesh)
            made.append(chosen_B)
            if end_token is not None:
                ended_B |= chosen_B == end_token
                if bool(ended_B.all()):
                    break
            tokens_BS = chosen_B.unsqueeze(1)
    finally:
        model.train(was_training)
        free_gathered(model, model.mesh)
    return [_until(row, end_token) for row in torch.stack(made, 1).tolist()]


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """One token per row, int64 [B]: the likeliest at temperature 0, else drawn by the numbers `uniform_B` in [0, 1).

    Tokens are lined up by probability, best first, ties to the lower id; the draw falls into one's share of those
    that `top_k` (0: all) and `top_p` leave. The best one is always left.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV.double() / temperature
    probs_BV, tokens_BV = scaled_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    total_BV = probs_BV.cumsum(-1)
    # A token stays while those before it have not yet made up top_p.
    num_kept_B1 = (total_BV - probs_BV < top_p).sum(-1, keepdim=True).clamp(min=1, max=top_k or None)
    mass_B1 = total_BV.gather(-1, num_kept_B1 - 1)
    place_B1 = torch.searchsorted(total_BV, uniform_B.unsqueeze(-1) * mass_B1, right=True)
    return tokens_BV.gather(-1, torch.minimum(place_B1, num_kept_B1 - 1)).squeeze(-1)


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    vocab_size = model.config.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts: number {number} is empty; give it a token, for example the end token")
        strange = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if strange is not None:
            raise ValueError(f"prompts: token {strange} of number {number} is outside the vocabulary of {vocab_size}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is too small; use 1 or more")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} is negative; use 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} is outside (0, 1]; use 1 to keep all tokens")
    if top_k < 0:
        raise ValueError(f"top_k: {top_k} is negative; use 0 to keep all tokens")


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad tokens per prompt [B], and the prompts side by side so that all end in the last column, [B, S]."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    # Which token pads does not matter: nobody sees it.
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(padding, device=device), torch.tensor(rows, device=device)


def _stream(seed: int, count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _mesh_of(model: Decoder) -> Mesh | None:
    """The ranks that the model is spread over; None for a dense model in one piece, which needs no other rank."""
    if any(axis.size > 1 for axis in (model.mesh.pipeline, model.mesh.shard, model.mesh.tensor)):
        return model.mesh
    return next((module.dispatcher.mesh for module in model.modules() if isinstance(module, MoELayer)), None)


def _take_from(rank: int, tokens_B: Tensor, mesh: Mesh) -> None:
    """Overwrites `tokens_B` with those of `rank`: ranks that differ in a last bit would stop at different steps and
    hang."""
    if mesh.world.group is None:
        return
    num_bytes = tokens_B.numel() * tokens_B.element_size() if mesh.world.rank == rank else 0
    mesh.recorder.collective_entered("sampled-tokens", num_bytes)
    watch = Stopwatch(tokens_B.device)
    dist.broadcast(tokens_B, src=rank, group=mesh.world.group)
    mesh.recorder.collective_left("sampled-tokens", watch.stop())


def _until(tokens: list[int], end_token: int | None) -> list[int]:
    return tokens[: tokens.index(end_token)] if end_token in tokens else tokens
