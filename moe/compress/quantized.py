"""Modules that compute from weights in few bits, and a decoder with them in place of its linear layers and experts.

For evaluation and generation in one process. On a CPU products run in ATen's kernels for packed weights, in bf16 with
sums in fp32 whatever the dtype of the model: they read a quarter or half of the bytes of bf16, which is what one token
at a time waits for. Elsewhere, and for shapes that the kernels do not take, weights are formed again for each product.

Not here: how codes come about and lie on disk (quantize.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...parallel.manifest import TensorEntry
from ..decoder import Decoder
from ..experts import GroupedExperts
from .plan import Quantize
from .quantize import codes_of, dequantize, nearest

__all__ = ["QuantizedExperts", "QuantizedLinear", "QuantizedWeight", "blank_quantized_", "pack_", "quantize_decoder_"]

_GROUPS = (32, 64, 128, 256)
"""Those that ATen's kernel for 4 bits takes."""


class QuantizedWeight(nn.Module):
    """Stands where the weight of a linear layer would, or a stack of them: `F.linear(x, it)` multiplies by it.

    Made of `q` and `scale` as on disk, under these names in a state dict; after `pack_` of what the kernel reads, and
    then it has no state dict.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.is_packed = False

    @property
    def device(self) -> torch.device:
        return self.q.device

    def pack_(self) -> None:
        """Lays the weights out for the kernel of this machine, once, where it has one for them."""
        if self.is_packed or not _has_kernel(self.q, self.scale):
            return
        q, scale = self.q, self.scale
        if q.dtype == torch.uint8:
            scale = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(-2, -3).contiguous()
            # Expert by expert: codes as the kernel's packing wants them take eight times the memory.
            packed = [_packed(each) for each in q.flatten(0, -3)] if q.dim() == 3 else _packed(q)
            q = torch.stack(packed) if isinstance(packed, list) else packed
        else:
            scale = scale.squeeze(-1).contiguous()
        # Another layout than `q` on disk has: nobody should save it under that name.
        self.register_buffer("q", q, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.is_packed = True

    def product(self, x_RI: Tensor, expert: int | None = None) -> Tensor:
        """Rows times the weight's transpose, [R, O], in the dtype of `x_RI`."""
        q, scale = (self.q, self.scale) if expert is None else (self.q[expert], self.scale[expert])
        if not self.is_packed:
            return F.linear(x_RI, dequantize(q, scale).to(x_RI.dtype))
        # Scales follow a model that is moved to another dtype; the kernels want theirs.
        rows, scale = x_RI.bfloat16().contiguous(), scale.bfloat16()
        if q.dtype == torch.int8:
            return torch.ops.aten._weight_int8pack_mm(rows, q, scale).to(x_RI.dtype)
        group = rows.size(-1) // scale.size(0)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, q, group, scale).to(x_RI.dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`F.linear`, which is what attention and the dense layers do with their weights; nothing else."""
        if function is not F.linear or len(args) != 2 or kwargs:
            return NotImplemented
        x, weight = args
        return weight.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class QuantizedLinear(nn.Module):
    """A linear layer without bias."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)  # pyright: ignore[reportArgumentType]


class QuantizedExperts(nn.Module):
    """As `GroupedExperts`, each expert's products over its own rows."""

    def __init__(self, gate_up: QuantizedWeight, down: QuantizedWeight) -> None:
        super().__init__()
        # [e, 2F, D], [e, D, F].
        self.gate_up, self.down = gate_up, down

    def forward(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        """Each row through its expert: rows of expert i end before row offsets_e[i]."""
        y_RD, start = torch.empty_like(rows_RD), 0
        for expert, end in enumerate(offsets_e.tolist()):
            if end > start:
                gate, up = self.gate_up.product(rows_RD[start:end], expert).chunk(2, -1)
                y_RD[start:end] = self.down.product(F.silu(gate) * up, expert)
            start = end
        return y_RD

    def hold(self, use: Any, x_TD: Tensor) -> Tensor:
        """`use(x_TD)`: the weights are whole anyway."""
        return use(x_TD)


def quantize_decoder_(model: Decoder, how: Quantize) -> Decoder:
    """`model`, its blocks' linear layers and experts in few bits, rounded to the nearest, in evaluation mode.

    Routers, norms, the embedding and the output layer stay as they are. Raises ValueError where groups do not divide
    a weight, or weights are spread over ranks.
    """

    def rounded(name: str, weight: Tensor) -> QuantizedWeight:
        try:
            return QuantizedWeight(*nearest(weight.detach(), how))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    _check_whole(model)
    _replace(model, {name: rounded(name, weight) for name, weight in _linear_weights(model)})
    pack_(model)
    return model.eval()


def blank_quantized_(model: Decoder, saved: Mapping[str, TensorEntry]) -> None:
    """Makes room in `model` for those of its weights that a checkpoint holds in few bits; after loading call `pack_`.

    saved: the tensors of the checkpoint, under names of the model.
    Raises ValueError where something else is in few bits, a part is missing, or weights are spread over ranks.
    """
    _check_whole(model)
    found = {name.removesuffix(".q") for name in saved if name.endswith(".q")}
    known = dict(_linear_weights(model))
    if strange := sorted(found - known.keys()):
        raise ValueError(f"{strange[0]} is in few bits, and no linear layer or expert of this model")
    # Experts have two weights, and one module.
    wanted = {name for name in known if name in found or _other(name) in found}
    if missing := sorted(
        f"{name}.{part}" for name in wanted for part in ("q", "scale") if f"{name}.{part}" not in saved
    ):
        raise ValueError(f"{missing[0]} is missing, without which weights in few bits say nothing")

    def blank(name: str) -> Tensor:
        return torch.empty(saved[name].shape, dtype=saved[name].dtype, device=next(model.parameters()).device)

    _replace(model, {name: QuantizedWeight(blank(f"{name}.q"), blank(f"{name}.scale")) for name in sorted(wanted)})


def pack_(model: nn.Module) -> None:
    """`QuantizedWeight.pack_` of all of them."""
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.pack_()


def _linear_weights(model: Decoder) -> Iterable[tuple[str, Tensor]]:
    """Name and weight of everything in the blocks that may be quantised."""
    for prefix, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            yield f"{prefix}.weight", module.weight
        elif isinstance(module, GroupedExperts):
            yield f"{prefix}.gate_up", module.gate_up
            yield f"{prefix}.down", module.down


def _other(name: str) -> str:
    """The other weight of the same experts; of a linear layer the only one."""
    swapped = {"gate_up": "down", "down": "gate_up"}
    prefix, _, own = name.rpartition(".")
    return f"{prefix}.{swapped.get(own, own)}"


def _replace(model: Decoder, weights: Mapping[str, QuantizedWeight]) -> None:
    """Puts modules that compute from `weights` where those were that had weights of these names."""
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name in weights):
        owner, _, own = prefix.rpartition(".")
        if f"{prefix}.weight" in weights:
            new: nn.Module = QuantizedLinear(weights[f"{prefix}.weight"])
        else:
            new = QuantizedExperts(weights[f"{prefix}.gate_up"], weights[f"{prefix}.down"])
        setattr(model.get_submodule(owner), own, new)


def _check_whole(model: Decoder) -> None:
    mesh = model.mesh
    ranks = max(mesh.world.size, mesh.expert.size, mesh.shard.size, mesh.tensor.size)
    if ranks > 1:
        raise ValueError(f"quantised weights are for one process, and this model is spread over {ranks} ranks")


def _has_kernel(q: Tensor, scale: Tensor) -> bool:
    if q.device.type != "cpu":
        return False
    if q.dtype == torch.int8:
        # Of other widths it reads beyond the end.
        return q.size(-1) % 16 == 0
    return q.size(-2) % 16 == 0 and 2 * q.size(-1) // scale.size(-1) in _GROUPS


def _packed(q: Tensor) -> Tensor:
    # Its last argument counts tiles of CUDA's layout; here it says nothing.
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_of(q).int() + 8, 1)
