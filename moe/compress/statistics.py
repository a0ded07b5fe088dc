"""What is summed over the tokens of one layer, and how ranks add it up (METHODS C5).

Sums and counts only, in fp64 (Hessians in fp32), never means or roots: those would not add up over ranks. An expert's
sums are formed on the rank that owns it, which sees every token of its copy of the model.

    tokens               []            tokens that count
    ffn_cosine           []            cos(a, a + ffn(norm(a))), Layer Drop's score (C1)
    block_cosine_W       [W]           cos(h_(l+1-g), h_(l+1)) for g = 1 .. W, l this layer: Block Drop's score (C2) of
                                       the g blocks that end here; zeros where there are not so many
    mass_E, gate_E       [E]           of the router's probabilities, and of the weights it applied
    routed_E             [E]           tokens each expert got
    reap_E               [E]           weight x |output| over routed tokens (REAP)
    square_E             [E]           |output|^2 over routed tokens
    input_sq_ED          [E, D]        squares of each input, for Wanda
    hidden_sq_EF         [E, F]        squares of each input of the down projection
    hessian_in_DD.3, hessian_hidden_FF.3  of expert 3, where asked for: x x^T, for SparseGPT
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallel.collectives import all_reduce
from ...parallel.mesh import Mesh
from .streamed import Choice, StreamedLayer

__all__ = ["LayerSums"]


class LayerSums:
    """The sums of one layer on this rank, of the tokens and experts it has."""

    def __init__(self, layer: StreamedLayer, mesh: Mesh, window: int, hessians: bool) -> None:
        self.num_experts = layer.num_experts
        self.own = range(0)
        with mesh.device:
            self._make(layer, mesh, window, hessians)

    def _make(self, layer: StreamedLayer, mesh: Mesh, window: int, hessians: bool) -> None:
        self.sums = {name: _zeros() for name in ("tokens", "ffn_cosine")}
        """Of this rank's tokens."""
        self.sums["block_cosine_W"] = _zeros(window)
        self.owned: dict[str, Tensor] = {}
        """Of this rank's experts, [e, ...]."""
        self.hessians: dict[str, Tensor] = {}
        """The same, fp32."""
        if layer.experts is None:
            return
        e, D, F_ = layer.experts.down.shape
        self.own = range(mesh.expert.rank * e, (mesh.expert.rank + 1) * e)
        self.sums |= {name: _zeros(layer.num_experts) for name in ("mass_E", "gate_E")}
        self.owned = {name: _zeros(e) for name in ("routed_E", "reap_E", "square_E")}
        self.owned |= {"input_sq_ED": _zeros(e, D), "hidden_sq_EF": _zeros(e, F_)}
        if hessians:
            self.hessians = {"hessian_in_DD": torch.zeros(e, D, D), "hessian_hidden_FF": torch.zeros(e, F_, F_)}

    def add_residual(self, a_TD: Tensor, b_TD: Tensor) -> None:
        """The stream before and after the feed-forward network, of tokens that count."""
        self.sums["tokens"] += len(a_TD)
        self.sums["ffn_cosine"] += F.cosine_similarity(a_TD, b_TD, dim=-1).double().sum()

    def add_choice(self, choice: Choice) -> None:
        """What the router says of this rank's tokens."""
        self.sums["mass_E"] += choice.probs_TE.double().sum(0)
        self.sums["gate_E"].scatter_add_(0, choice.experts_TK.reshape(-1), choice.weights_TK.double().reshape(-1))

    def add_rows(
        self, rows_RD: Tensor, hidden_RF: Tensor, outputs_RD: Tensor, gates_R: Tensor, offsets_e: Tensor
    ) -> None:
        """What this rank's experts read and make: rows of expert i end before offsets_e[i]."""
        sizes = offsets_e.diff(prepend=offsets_e.new_zeros(1)).long()
        expert_R = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        norms_R = outputs_RD.norm(dim=-1).double()
        self.owned["routed_E"] += sizes.double()
        for name, values_R in (("reap_E", gates_R.double() * norms_R), ("square_E", norms_R**2)):
            self.owned[name].scatter_add_(0, expert_R, values_R)
        start = 0
        for i, end in enumerate(offsets_e.tolist()):
            for rows, square, hessian in (
                (rows_RD[start:end], "input_sq_ED", "hessian_in_DD"),
                (hidden_RF[start:end], "hidden_sq_EF", "hessian_hidden_FF"),
            ):
                self.owned[square][i] += rows.square().sum(0, dtype=torch.float64)
                if hessian in self.hessians:
                    self.hessians[hessian][i].addmm_(rows.t(), rows)
            start = end

    def reduced(self, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
        """Name and sum over all ranks, the same on every rank, one at a time: all exhaust it together.

        Raises ValueError where a sum is not finite.
        """
        for name, own in self.sums.items():
            yield name, _all_reduce(name, own.clone(), mesh)
        for name, own in self.owned.items():
            whole = own.new_zeros(self.num_experts, *own.shape[1:])
            whole[self.own.start : self.own.stop] = own
            yield name, _all_reduce(name, whole, mesh)
        for name, own in self.hessians.items():
            for expert in range(self.num_experts):
                here = expert in self.own
                one = own[expert - self.own.start].clone() if here else torch.zeros_like(own[0])
                yield f"{name}.{expert}", _all_reduce(name, one, mesh)


def _all_reduce(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    all_reduce(tensor, mesh.world, name, mesh.recorder)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: is not finite; the model's activations overflow on this text")
    return tensor


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
