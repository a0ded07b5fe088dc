"""A checkpoint of ours as a streamed model: one layer's modules, filled with that layer's tensors and experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...parallel.chunks import read_tensor
from ...parallel.manifest import check_complete, read_manifest, some
from ..attention import Attention, rotary_table
from ..config import ModelConfig, RouterConfig, dropless
from ..feedforward import SwiGLU
from ..norm import RMSNorm
from ..router import TopKRouter
from .fingerprint import run_fingerprint
from .places import NATIVE, place_of
from .reading import chosen_experts, most_choices, read_whole, share_of, size_of, whole_shapes
from .shapes import shape_of_model
from .streamed import Choice, ExpertWeights, LayerSize

__all__ = ["NativeLayer", "NativeModel"]

_MODEL = "model."
_GATE_UP, _DOWN = "ffn.experts.gate_up", "ffn.experts.down"


class _Parts(nn.Module):
    """A block without experts, its parts under the names they have in `decoder.Block`."""

    def __init__(self, config: ModelConfig, router: RouterConfig, number: int, num_experts: int, feed: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, number)
        if not feed:
            return
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        if not num_experts:
            self.ffn = SwiGLU(config.d_model, config.dense_width)
            return
        assert config.moe is not None
        self.ffn = nn.Module()
        self.ffn.router = TopKRouter(config.d_model, num_experts, router)
        if config.moe.shared_experts:
            self.ffn.shared = SwiGLU(config.d_model, config.moe.d_expert * config.moe.shared_experts)


@dataclass
class NativeLayer:
    """See `StreamedLayer`."""

    num_experts: int
    is_dense: bool
    experts: ExpertWeights | None
    _parts: Any
    _config: ModelConfig

    def attend(self, h_BSD: Tensor) -> Tensor:
        """See `StreamedLayer`."""
        positions_S = torch.arange(h_BSD.size(1), device=h_BSD.device)
        table = rotary_table(positions_S, self._config.head_width, self._config.rope_theta, h_BSD.dtype)
        return h_BSD + self._parts.attention(self._parts.attention_norm(h_BSD), table)

    def norm(self, a_BSD: Tensor) -> Tensor:
        """See `StreamedLayer`."""
        return self._parts.ffn_norm(a_BSD)

    def route(self, x_TD: Tensor) -> Choice:
        """See `StreamedLayer`."""
        routing = self._parts.ffn.router(x_TD, dropless=True)
        return Choice(routing.experts_TK, routing.weights_TK, routing.probs_TE)

    def shared(self, x_TD: Tensor) -> Tensor | None:
        """See `StreamedLayer`."""
        ffn = self._parts.ffn
        return ffn.shared(x_TD) if hasattr(ffn, "shared") else None

    def dense(self, x_TD: Tensor) -> Tensor:
        """See `StreamedLayer`."""
        return self._parts.ffn(x_TD)


class NativeModel:
    """See `StreamedModel`; a checkpoint in the folder of a run, whatever layout of ranks wrote it."""

    def __init__(
        self, config: ModelConfig, router: RouterConfig, checkpoint: Path | str, device: torch.device | str = "cpu"
    ) -> None:
        """`config` with the vocabulary filled in.

        Raises ValueError where the checkpoint is damaged or of another model, or the router is for benchmarks.
        """
        if router.kind != "learned":
            raise ValueError(f"router.kind: {router.kind} ignores the tokens; only learned routers tell experts apart")
        self.config, self.path, self.device = config, Path(checkpoint), torch.device(device)
        self._router, self._manifest = dropless(config, router)[1], read_manifest(self.path)
        check_complete(self.path, self._manifest)
        self.shape = shape_of_model(config, router)
        self.d_model, self.vocab_size = config.d_model, config.vocab_size
        self._check()

    def _check(self) -> None:
        """Raises ValueError unless the checkpoint holds the tensors of the model, all of them and no others."""
        wanted = dict(self._outside)
        for number in range(self.shape.layers):
            wanted |= self._shapes(number)
        weights = {n.removeprefix(_MODEL): e for n, e in self._manifest.tensors.items() if n.startswith(_MODEL)}
        packed = {name for name, entry in weights.items() if entry.dtype == torch.uint8}
        found = whole_shapes({name: entry.shape for name, entry in weights.items()}, packed)
        shared = sorted(wanted.keys() & found.keys())
        problems = {
            "misses": sorted(wanted.keys() - found.keys()),
            "has, and should not,": sorted(found.keys() - wanted.keys()),
            "has in another shape": [name for name in shared if tuple(wanted[name]) != tuple(found[name])],
        }
        if said := "; ".join(f"{what} {some(names)}" for what, names in problems.items() if names):
            raise ValueError(f"{self.path} is no checkpoint of this model: it {said}")

    @property
    def fingerprint(self) -> str:
        """See `StreamedModel`."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return run_fingerprint(self.path, self.path.parents[1])

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """See `StreamedModel`. The embedding stays in memory once it has been asked for."""
        return F.embedding(tokens_BS.to(self.device), self._embedding)

    def logits(self, h_BSD: Tensor) -> Tensor:
        """See `StreamedModel`. The output layer stays in memory once it has been asked for."""
        norm, weight = self._output
        return F.linear(norm(h_BSD), weight)

    @cached_property
    def _embedding(self) -> Tensor:
        return self._read("embedding.weight")

    @cached_property
    def _output(self) -> tuple[nn.Module, Tensor]:
        norm = RMSNorm(self.d_model, self.config.norm_eps)
        norm.load_state_dict({"weight": self._read("norm.weight")}, assign=True)
        weight = self._embedding if self.config.tie_embeddings else self._read("head.weight")
        return norm.requires_grad_(False), weight

    def layer(
        self, number: int, kept: Sequence[int] | None = None, share: tuple[int, int] = (0, 1), feed: bool = True
    ) -> NativeLayer:
        """See `StreamedModel`."""
        experts = self.shape.experts[number] if feed else 0
        chosen = chosen_experts(number, kept if feed else None, experts, self.shape)
        own = share_of(chosen, share)
        parts = self._parts(number, len(chosen), feed)
        tensors = {name: self._read(f"blocks.{number}.{name}") for name in parts.state_dict()}
        for name in tensors:
            if name.startswith("ffn.router."):
                tensors[name] = tensors[name][list(chosen)]
        parts.load_state_dict(tensors, assign=True)
        stacks = None
        if own:
            gate_up, down = (self._read(f"blocks.{number}.{name}", own) for name in (_GATE_UP, _DOWN))
            stacks = ExpertWeights(gate_up, down)
        is_dense = feed and number in self.shape.dense
        return NativeLayer(len(chosen), is_dense, stacks, parts.requires_grad_(False).eval(), self.config)

    @property
    def outside_size(self) -> int:
        """See `StreamedModel`."""
        return sum(torch.Size(shape).numel() for shape in self._outside.values())

    @property
    def element_bytes(self) -> int:
        """See `StreamedModel`."""
        return self._manifest.tensors[_MODEL + "embedding.weight"].dtype.itemsize

    def size(self, number: int) -> LayerSize:
        """See `StreamedModel`."""
        shapes = self._shapes(number).items()
        places = {place_of(_MODEL + name, NATIVE, self.shape.layers): shape for name, shape in shapes}
        return size_of(places, self.shape.experts[number])

    @property
    def _outside(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors outside the layers."""
        matrix = self.vocab_size, self.d_model
        head = {} if self.config.tie_embeddings else {"head.weight": matrix}
        return {"embedding.weight": matrix, "norm.weight": (self.d_model,), **head}

    def _shapes(self, number: int) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the layer's tensors."""
        experts, moe, D = self.shape.experts[number], self.config.moe, self.d_model
        parts = self._parts(number, experts, feed=True)
        shapes = {f"blocks.{number}.{name}": tuple(tensor.shape) for name, tensor in parts.state_dict().items()}
        if experts and moe is not None:
            shapes[f"blocks.{number}.{_GATE_UP}"] = experts, 2 * moe.d_expert, D
            shapes[f"blocks.{number}.{_DOWN}"] = experts, D, moe.d_expert
        return shapes

    def _parts(self, number: int, num_experts: int, feed: bool) -> _Parts:
        """On meta: the layer with a router of so many experts; without `feed`, what attends."""
        top_k = min(self.shape.top_k, most_choices(num_experts, self.shape)) if num_experts else self.shape.top_k
        # With one choice left the gradient has no meaning, and the same weight.
        router = replace(self._router, top_k=top_k, detach=True)
        with torch.device("meta"):
            return _Parts(self.config, router, number, num_experts, feed and self.config.has_ffn(number))

    def _read(self, name: str, experts: Sequence[int] | None = None) -> Tensor:
        def read(name: str) -> Tensor:
            return read_tensor(self.path, self._manifest, name, experts)

        return read_whole(_MODEL + name, self._manifest.tensors, read).to(self.device, torch.float32)
