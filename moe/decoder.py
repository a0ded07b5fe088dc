"""The decoder-only language model: embedding, blocks of attention and feed-forward or MoE, output layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.cross_entropy import linear_cross_entropy
from ..parallel import vocabulary
from ..parallel.apply import Initialiser, parallelize
from ..parallel.config import KEEP_ALL, RecomputeConfig
from ..parallel.mesh import Mesh
from ..parallel.recomputation import Recomputation
from ..parallel.recompute import PLAIN, Calls, calls_of
from ..parallel.relay import Relay
from ..parallel.stages import Stages, whole
from ..parallel.tensor import ALONE, Stream, compute_dtype, streams
from .attention import Attention, KVCache, rotary_table
from .config import ModelConfig, RouterConfig
from .feedforward import SwiGLU
from .layer import MoELayer
from .norm import RMSNorm
from .routing import Routing


class Block(nn.Module):
    """x + attention(norm(x)), then, unless the layer only attends, x + feed-forward or MoE(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        layer: int,
        mesh: Mesh,
        piece_bytes: int,
        backend: Backend,
        calls: Calls = PLAIN,
    ) -> None:
        super().__init__()
        self._calls = calls
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, backend)
        self.attention = Attention(config, layer, backend, mesh, calls)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps, backend) if config.has_ffn(layer) else None
        self.ffn: MoELayer | SwiGLU | None = None
        if config.moe is not None and config.is_moe(layer):
            moe = replace(config.moe, experts=config.num_experts(layer), per_layer=(), dense=())
            number = config.nth_moe(layer)
            self.ffn = MoELayer(config.d_model, moe, router, mesh, piece_bytes, backend, number, calls)
        elif config.is_dense(layer):
            self.ffn = SwiGLU(config.d_model, config.dense_width, calls)

    def forward(
        self,
        x_BSD: Tensor,
        table: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        stream: Stream = ALONE,
    ) -> tuple[Tensor, Routing | None]:
        """The residual stream after this block, and its routing if it has experts."""
        # Within the block: FSDP2 gathers its weights around both, forward and backward.
        return self._calls.block(self._forward, x_BSD, table, cache, mask, stream)

    def _forward(
        self,
        x_BSD: Tensor,
        table: tuple[Tensor, Tensor],
        cache: KVCache | None,
        mask: Tensor | None,
        stream: Stream,
    ) -> tuple[Tensor, Routing | None]:
        call = self._calls.operator
        normed_BSD = call("norm 1", lambda x: compute_dtype(self.attention_norm(x)), x_BSD)
        x_BSD = call("residual 1", torch.add, x_BSD, self.attention(normed_BSD, table, cache, mask, stream))
        if self.ffn is None or self.ffn_norm is None:
            return x_BSD, None
        normed_BSD = call("norm 2", self.ffn_norm, x_BSD)
        if isinstance(self.ffn, MoELayer):
            y_BSD, routing = self.ffn(normed_BSD, dropless=cache is not None, stream=stream)
        else:
            y_BSD, routing = self.ffn(normed_BSD, stream), None
        return x_BSD + y_BSD.to(x_BSD.dtype), routing


@dataclass(frozen=True)
class DecoderOutput:
    """What one forward pass gives."""

    hidden_BSD: Tensor
    """After the final norm: what the output layer reads; of this rank's part of each sequence where tensor ranks share
    it. On ranks without the last stage, what they passed on."""
    routings: list[Routing]
    """One per MoE layer of this rank, in order."""


class Decoder(nn.Module):
    """A transformer language model over token ids: this rank's layers, under the names they have in the whole.

    Tensor ranks read the same token ids; between layers each holds its part of every sequence, in order of rank.
    """

    tensor_parameters: ClassVar = {"embedding.weight": 0, "head.weight": 0}

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        mesh: Mesh,
        piece_bytes: int = 0,
        backend: Backend = "auto",
        stages: Stages | None = None,
        recompute: RecomputeConfig = KEEP_ALL,
    ) -> None:
        """`stages` says which layers this rank holds, the embedding with the first and the output layer with the
        last; None: all."""
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size: 0 is only for configurations that a tokenizer completes; set the size")
        self.config = config
        self.mesh = mesh
        self.backend: Backend = backend
        self.recompute, self.recomputation = recompute, Recomputation()
        self.cut_stream, self.whole_stream = streams(mesh)
        self.stages = whole(config.layers) if stages is None else stages
        self.relay = Relay(mesh, self.stages)
        if self.stages.has_first:
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # Iterates over the layers held; each is named by its number in the model.
        self.blocks = nn.ModuleList()
        for layer in self.stages.held:
            calls = calls_of(recompute, self.recomputation, layer)
            block = Block(config, router, layer, mesh, piece_bytes, backend, calls)
            self.blocks.add_module(str(layer), block)
        if self.stages.has_last:
            self.norm = RMSNorm(config.d_model, config.norm_eps, backend)
        has_head = self.stages.has_last and not config.tie_embeddings
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False) if has_head else None

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of this rank's MoE layers among those of the model, in order."""
        return _moe_layers(self.config, self.stages.held)

    @property
    def output_weight(self) -> Tensor:
        """[V, D] weight of the output layer: the embedding's where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens_BS: Tensor, cache: KVCache | None = None) -> DecoderOutput:
        """Hidden states of `tokens_BS` (int64); with a `cache`, of tokens that follow what it holds.

        In a pipeline all ranks call it with the same tokens, without gradients: `Section` is what learns. Raises
        ValueError where tensor ranks cannot share sequences of this length.
        """
        B, S = tokens_BS.shape
        own = S if cache is not None else S // self.mesh.tensor.size
        x_BSD, routings = tokens_BS, []
        for stage in self.stages.own:
            if stage > 0:
                x_BSD = self.relay.receive(stage, (B, own, self.config.d_model), next(self.parameters()).dtype)
            x_BSD, more = self._run(stage, x_BSD, cache)
            routings += more
            if stage < self.stages.last:
                self.relay.send(stage, x_BSD)
        if cache is not None:
            cache.filled += S
        return DecoderOutput(x_BSD, routings)

    def run(self, stage: int, x: Tensor) -> tuple[Tensor, list[Routing]]:
        """What `stage` makes of tokens [B, S], if it is the first, or else of hidden states [B, S, D], of which tensor
        ranks have their part of S each.

        Beside `forward` the only way in: where storage is shared, weights are gathered around both (shard.py).
        """
        return self._run(stage, x)

    def _run(self, stage: int, x: Tensor, cache: KVCache | None = None) -> tuple[Tensor, list[Routing]]:
        """See `run`. With a cache tensor ranks have all of S."""
        self.recomputation.begin(self)
        ranks = self.mesh.tensor.size
        # With a cache tokens come one at a time, which nobody can share.
        stream, shares = (self.whole_stream, 1) if cache is not None else (self.cut_stream, ranks)
        S = x.size(1) if stage == 0 else x.size(1) * shares
        if S % shares:
            raise ValueError(f"sequences of {S} tokens cannot be shared by {ranks} tensor ranks")
        x_BSD = self._embed(x, stream) if stage == 0 else x
        positions = cache.positions(S) if cache is not None else torch.arange(S, device=x_BSD.device)
        table = rotary_table(positions, self.config.head_width, self.config.rope_theta, x_BSD.dtype)
        mask = cache.mask(S) if cache is not None else None
        routings: list[Routing] = []
        for layer in self.stages.layers[stage]:
            x_BSD, routing = self.blocks.get_submodule(str(layer))(x_BSD, table, cache, mask, stream)
            if routing is not None:
                routings.append(routing)
        return (self.norm(x_BSD) if stage == self.stages.last else x_BSD), routings

    def _embed(self, tokens_BS: Tensor, stream: Stream) -> Tensor:
        if self.mesh.tensor.group is None:
            return self.embedding(tokens_BS)
        return vocabulary.look_up(tokens_BS, self.embedding.weight, self.mesh, stream)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Scores of the next token, [B, S, V]; on tensor ranks without gradient, of tokens that all of them hold."""
        if self.mesh.tensor.group is None:
            return F.linear(hidden_BSD, self.output_weight)
        return vocabulary.scores(hidden_BSD, self.output_weight, self.mesh)

    def output_operands(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [T, D] and weight [V, D] of the output layer, in the dtype that it computes in."""
        hidden_TD, weight = hidden_BSD.flatten(0, 1), self.output_weight
        device = hidden_TD.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_TD, weight = hidden_TD.to(dtype), weight.to(dtype)
        return hidden_TD, weight

    def loss_sum(self, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Sum of next-token losses in nats; targets of -100 count nothing.

        On tensor ranks: targets of whole sequences give the sum over this rank's part of them.
        """
        hidden_TD, weight = self.output_operands(hidden_BSD)
        if self.mesh.tensor.group is not None:
            targets_GT = vocabulary.spread_targets(targets_BS, self.mesh)
            return vocabulary.linear_cross_entropy(hidden_TD, weight, targets_GT, self.mesh)
        return linear_cross_entropy(hidden_TD, weight, targets_BS.reshape(-1), self.backend)


class Section(nn.Module):
    """One stage of a decoder as a module of its own, over the decoder's weights: `Decoder.run`."""

    def __init__(self, decoder: Decoder, stage: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(decoder.blocks.get_submodule(str(n)) for n in decoder.stages.layers[stage])
        ends: list[nn.Module] = [decoder.embedding] if stage == 0 else []
        if stage == decoder.stages.last:
            ends += [decoder.norm, decoder.embedding if decoder.head is None else decoder.head]
        self.ends = nn.ModuleList(ends)
        self._run, self.stage = decoder.run, stage
        self.moe_layers = _moe_layers(decoder.config, decoder.stages.layers[stage])
        """As `Decoder.moe_layers`, of this stage."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Routing]]:
        """See `Decoder.run`."""
        return self._run(self.stage, x)


def _moe_layers(config: ModelConfig, layers: Iterable[int]) -> list[int]:
    return [config.nth_moe(layer) for layer in layers if config.is_moe(layer)]


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
    stages: Stages | None = None,
    compute_dtype: torch.dtype | None = None,
    recompute: RecomputeConfig = KEEP_ALL,
) -> Decoder:
    """This rank's part of a freshly initialised model, the same model under every layout of ranks.

    compute_dtype: what it will compute in under autocast; None: `dtype`.
    """
    with torch.device("meta"):
        model = Decoder(config, router, mesh, piece_bytes, backend, stages, recompute)
    parallelize(model, mesh, initialiser(config), seed, dtype, compute_dtype)
    return model


def with_router(model: Decoder, router: RouterConfig) -> Decoder:
    """The same weights, shared and not copied, under another `router`; in the mode (training or not) of `model`.

    Raises ValueError where weights are spread over ranks: there a model starts from its configuration.
    """
    ranks = max(model.mesh.expert.size, model.mesh.shard.size, model.mesh.tensor.size)
    if ranks > 1:
        raise ValueError(f"the weights are spread over {ranks} ranks; build a model with that router")
    layers = (module for module in model.modules() if isinstance(module, MoELayer))
    pieces = next((layer.dispatcher.piece_bytes for layer in layers), 0)
    with torch.device("meta"):
        other = Decoder(model.config, router, model.mesh, pieces, model.backend, recompute=model.recompute)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other.train(model.training)
