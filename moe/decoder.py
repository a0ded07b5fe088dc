"""The decoder-only language model: embedding, blocks of attention and feed-forward or MoE, output layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.cross_entropy import linear_cross_entropy
from ..parallel.apply import Initialiser, parallelize
from ..parallel.mesh import Mesh
from .attention import Attention, KVCache, rotary_table
from .config import ModelConfig, RouterConfig
from .feedforward import SwiGLU
from .layer import MoELayer
from .norm import RMSNorm
from .routing import Routing


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward or MoE(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        layer: int,
        mesh: Mesh,
        piece_bytes: int,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, backend)
        self.attention = Attention(config, layer, backend)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps, backend)
        if config.moe is not None and config.is_moe(layer):
            nth = sum(config.is_moe(earlier) for earlier in range(layer))
            self.ffn = MoELayer(config.d_model, config.moe, router, mesh, piece_bytes, backend, nth)
        else:
            self.ffn = SwiGLU(config.d_model, config.dense_width)

    def forward(
        self,
        x_BSD: Tensor,
        table: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The residual stream after this block, and its routing if it has experts."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), table, cache, mask)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoELayer):
            y_BSD, routing = self.ffn(normed_BSD, dropless=cache is not None)
        else:
            y_BSD, routing = self.ffn(normed_BSD), None
        return x_BSD + y_BSD.to(x_BSD.dtype), routing


@dataclass(frozen=True)
class DecoderOutput:
    """What one forward pass gives."""

    hidden_BSD: Tensor
    """After the final norm: what the output layer reads."""
    routings: list[Routing]
    """One per MoE layer, in order."""


class Decoder(nn.Module):
    """A transformer language model over token ids."""

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        mesh: Mesh,
        piece_bytes: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size: 0 is only for configurations that a tokenizer completes; set the size")
        self.config = config
        self.mesh = mesh
        self.backend: Backend = backend
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config, router, layer, mesh, piece_bytes, backend) for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps, backend)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """[V, D] weight of the output layer: the embedding's where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens_BS: Tensor, cache: KVCache | None = None) -> DecoderOutput:
        """Hidden states of `tokens_BS` (int64); with a `cache`, of tokens that follow what it holds."""
        S = tokens_BS.size(1)
        x_BSD = self.embedding(tokens_BS)
        positions = cache.positions(S) if cache is not None else torch.arange(S, device=tokens_BS.device)
        table = rotary_table(positions, self.config.head_width, self.config.rope_theta, x_BSD.dtype)
        mask = cache.mask(S) if cache is not None else None
        routings: list[Routing] = []
        for block in self.blocks:
            x_BSD, routing = block(x_BSD, table, cache, mask)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.filled += S
        return DecoderOutput(self.norm(x_BSD), routings)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Scores of the next token, [B, S, V]."""
        return F.linear(hidden_BSD, self.output_weight)

    def loss_sum(self, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Sum of next-token losses in nats; targets of -100 count nothing."""
        hidden_TD, weight = hidden_BSD.flatten(0, 1), self.output_weight
        device = hidden_TD.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_TD, weight = hidden_TD.to(dtype), weight.to(dtype)
        return linear_cross_entropy(hidden_TD, weight, targets_BS.reshape(-1), self.backend)


def initialiser(config: ModelConfig) -> Initialiser:
    """Fills weights as published families do: normal with `init_std`, ones for norms.

    `init_residual: depth` divides the std of layers that write the residual stream by sqrt(2 * layers) (GPT-2).
    """
    depth = math.sqrt(2 * config.layers) if config.init_residual == "depth" else 1.0

    def fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if tensor.dim() == 1 and "norm" in name:
            tensor.fill_(1.0)
            return
        writes_residual = name.endswith(("attention.out.weight", ".down", ".down.weight"))
        std = config.init_std / (depth if writes_residual else 1.0)
        # Drawn in fp32 whatever the dtype, so that fp32 and fp64 runs start from the same weights.
        tensor.copy_(torch.empty(tensor.shape, device=tensor.device).normal_(0.0, std, generator=generator))

    return fill


def build_decoder(
    config: ModelConfig,
    router: RouterConfig,
    mesh: Mesh,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    piece_bytes: int = 0,
    backend: Backend = "auto",
) -> Decoder:
    """This rank's part of a freshly initialised model, the same model under every layout of ranks."""
    with torch.device("meta"):
        model = Decoder(config, router, mesh, piece_bytes, backend)
    parallelize(model, mesh, initialiser(config), seed, dtype)
    return model


def with_router(model: Decoder, router: RouterConfig) -> Decoder:
    """The same weights, shared and not copied, under another `router`; in the mode (training or not) of `model`.

    Raises ValueError where experts are spread over ranks: there a model starts from its configuration.
    """
    if model.mesh.expert.size > 1:
        raise ValueError(f"the experts are spread over {model.mesh.expert.size} ranks; build a model with that router")
    first = next(block.ffn for block in model.blocks if isinstance(block.ffn, MoELayer))
    with torch.device("meta"):
        other = Decoder(model.config, router, model.mesh, first.dispatcher.piece_bytes, model.backend)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other.train(model.training)
