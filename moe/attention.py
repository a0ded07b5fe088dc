"""Rotary grouped-query attention through torch's scaled_dot_product_attention, with a cache for generation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..parallel.mesh import Mesh
from ..parallel.recompute import PLAIN, Calls
from ..parallel.tensor import ALONE, Stream, compute_dtype, local
from .config import ModelConfig
from .norm import CutRMSNorm, RMSNorm


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, for all layers of this rank; B sequences padded on the left."""

    keys: dict[int, Tensor]
    """Per layer [B, kv_heads, max_tokens, d_head], of the heads that this rank computes."""
    values: dict[int, Tensor]
    padding_B: Tensor
    """int64: pad tokens at the left of each sequence."""
    filled: int = 0
    """Tokens in the cache, the same for all sequences."""

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        padding_B: Tensor,
        max_tokens: int,
        dtype: torch.dtype,
        layers: Iterable[int] | None = None,
        ranks: int = 1,
    ) -> KVCache:
        """A cache for `max_tokens` tokens of each of B sequences.

        layers: None is all of the model; ranks: that the heads are spread over.
        """
        shape = (padding_B.numel(), config.num_kv_heads // ranks, max_tokens, config.head_width)

        held = list(range(config.layers) if layers is None else layers)

        def memory() -> dict[int, Tensor]:
            return {layer: torch.zeros(shape, dtype=dtype, device=padding_B.device) for layer in held}

        return cls(memory(), memory(), padding_B)

    def positions(self, new: int) -> Tensor:
        """Positions [B, new] of the next tokens, counted from each sequence's first real token."""
        index = torch.arange(self.filled, self.filled + new, device=self.padding_B.device)
        return (index - self.padding_B.unsqueeze(1)).clamp(min=0)

    def mask(self, new: int) -> Tensor:
        """[B, 1, new, filled + new]: which cached token each new one may see."""
        device = self.padding_B.device
        key = torch.arange(self.filled + new, device=device)
        query = torch.arange(self.filled, self.filled + new, device=device).unsqueeze(1)
        seen = (key <= query) & (key >= self.padding_B.view(-1, 1, 1))
        # A pad token sees itself, so that no row is empty (softmax of nothing is NaN).
        return (seen | (key == query)).unsqueeze(1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values of `layer`; returns all up to the newest. `filled` moves after the last layer."""
        end = self.filled + keys.size(2)
        self.keys[layer][:, :, self.filled : end] = keys
        self.values[layer][:, :, self.filled : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def rotary_table(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., width / 2] of the rotation angles at `positions`, computed in fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=wide) / width
    angles = positions.unsqueeze(-1).to(wide) / theta**exponent
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.addcmul(first * cos, second, sin, value=-1, out=out[..., :half])
    torch.addcmul(second * cos, first, sin, out=out[..., half:])
    return out


def rotate(x_BSHd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding, halves paired as Hugging Face's weights expect (first with second half of the head)."""
    cos, sin = (t.unsqueeze(-2).to(x_BSHd.dtype) for t in table)
    return _Rotate.apply(x_BSHd, cos, sin)  # pyright: ignore[reportReturnType]


class Attention(nn.Module):
    """Causal self-attention; query heads share key/value heads in groups. Tensor ranks have heads of their own."""

    tensor_parameters: ClassVar = {"q.weight": 0, "k.weight": 0, "v.weight": 0, "out.weight": 1}

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        backend: Backend = "auto",
        mesh: Mesh | None = None,
        calls: Calls = PLAIN,
    ) -> None:
        super().__init__()
        self._calls = calls
        self.layer, self.width = layer, config.head_width
        ranks = 1 if mesh is None else mesh.tensor.size
        if config.heads % ranks or config.num_kv_heads % ranks:
            raise ValueError(
                f"tensor: {ranks} ranks cannot share {config.heads} heads and {config.num_kv_heads} key/value heads; "
                "use a divisor of both"
            )
        self.heads, self.kv_heads = config.heads // ranks, config.num_kv_heads // ranks
        q_width, kv_width = config.heads * self.width, config.num_kv_heads * self.width
        self.q = nn.Linear(config.d_model, q_width, bias=False)
        self.k = nn.Linear(config.d_model, kv_width, bias=False)
        self.v = nn.Linear(config.d_model, kv_width, bias=False)
        self.out = nn.Linear(q_width, config.d_model, bias=False)
        self.norm_per_head = config.qk_norm == "head"
        if config.qk_norm == "none":
            self.q_norm = self.k_norm = None
        elif self.norm_per_head or mesh is None or ranks == 1:
            widths = (self.width,) * 2 if self.norm_per_head else (q_width, kv_width)
            self.q_norm, self.k_norm = (RMSNorm(width, config.norm_eps, backend) for width in widths)
        else:
            self.q_norm, self.k_norm = (CutRMSNorm(width, config.norm_eps, mesh) for width in (q_width, kv_width))

    def forward(
        self,
        x_BSD: Tensor,
        table: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        stream: Stream = ALONE,
    ) -> Tensor:
        """Attends within each sequence; with a `cache`, also to what it holds, as its `mask` allows."""
        call, windows = self._calls.operator, self._calls.windows
        weights = [compute_dtype(local(projection.weight)) for projection in (self.q, self.k, self.v, self.out)]
        if stream.travels:
            q, k, v = call(
                "query and key", partial(stream.project, part="attention", windows=windows), x_BSD, *weights[:3]
            )
        else:
            q, k = call("query and key", stream.project, x_BSD, *weights[:2])
            (v,) = call("value", stream.project, x_BSD, weights[2])
        if self.q_norm is not None:
            q, k = call("query and key norm", self._norm, q, k)
        q, k = call("rotary", self._turn, q, k, *table)
        y_BSE = call("attention", partial(self._attend, cache=cache, mask=mask), q, k, v)
        y_BSD = call("projection", F.linear, y_BSE, weights[3])
        return stream.leave(y_BSD, "attention", windows)

    def _split(self, heads: Tensor) -> Tensor:
        """[B, S, H * d] -> [B, S, H, d]."""
        return heads.unflatten(-1, (-1, self.width))

    def _turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(self._split(q), (cos, sin)), rotate(self._split(k), (cos, sin))

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None and self.k_norm is not None
        if not self.norm_per_head:
            return self.q_norm(q), self.k_norm(k)
        return self.q_norm(self._split(q)).view_as(q), self.k_norm(self._split(k)).view_as(k)

    def _attend(
        self, q_BSHd: Tensor, k_BSHd: Tensor, v_BSE: Tensor, cache: KVCache | None, mask: Tensor | None
    ) -> Tensor:
        q, k, v = q_BSHd.transpose(1, 2), k_BSHd.transpose(1, 2), self._split(v_BSE).transpose(1, 2)
        grouped = self.heads != self.kv_heads
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            k, v = cache.append(self.layer, k, v)
            y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, enable_gqa=grouped)
        return y.transpose(1, 2).flatten(2)
