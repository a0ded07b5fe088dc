"""How good a model is as a plan leaves it, beside the whole one, before anything is applied.

An `Evaluator` keeps the layers it has read, and the stream before each of them under the plan it stands at: of a plan
that differs from layer 12 on only those layers are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallel.collectives import all_reduce
from ...parallel.mesh import Mesh, single
from .calibration import Calibration
from .forward import read_planned
from .plan import DropPlan
from .profile import block
from .streamed import StreamedLayer, StreamedModel

__all__ = ["Evaluator", "Quality"]

_Fate = tuple[bool, bool, tuple[int, ...], tuple[int, ...]]
"""Of a layer: whether its block goes, its feed-forward network, the experts kept, and those skipped."""


@dataclass(frozen=True)
class Quality:
    """Of predictions of the next token, over all tokens of the text that have one."""

    loss: float
    """Nats per token."""
    accuracy: float
    """Part of the tokens that were the likeliest."""
    kl: float
    """Nats per token, KL(whole model || this one)."""
    tokens: int


class Evaluator:
    """Judges plans on one text. All ranks of `mesh` make the same calls."""

    def __init__(
        self,
        model: StreamedModel,
        text: Calibration,
        mesh: Mesh | None = None,
        batch: int = 4,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.mesh, self.batch, self.progress = model, mesh or single(), batch, progress
        self.text = text.share(self.mesh.batch.rank, self.mesh.batch.size, batch)
        self._layers: dict[tuple[int, _Fate], StreamedLayer] = {}
        self._plan = DropPlan(base=model.fingerprint, shape=model.shape)
        with torch.no_grad():
            embedded = [model.embed(self.text.tokens_NS[at].to(self.mesh.device)) for at in self._batches()]
            self._before = self._run(self._plan, 0, torch.cat(embedded))
        self._dense_NSD = self._before[-1]
        self.whole = self._judge(self._dense_NSD)
        """Of the whole model."""

    @torch.no_grad()
    def quality(self, plan: DropPlan) -> Quality:
        """Of the model as `plan` leaves it; weights are those of the checkpoint, whatever it says of slimming."""
        first = self._first_difference(plan)
        return self._judge(self._run(plan, first, self._before[first])[-1])

    @torch.no_grad()
    def quality_of(self, logits: Callable[[slice], Tensor]) -> Quality:
        """Of any other model of the same vocabulary: which windows of `text` -> scores of the next token [B, S, V]."""
        return self._compared(lambda at, counts_BS: logits(at)[:, :-1][counts_BS])

    @torch.no_grad()
    def stand_at(self, plan: DropPlan) -> None:
        """Makes `plan` the one from which others are told apart: plans that are near it are judged faster.

        Of the layers read so far those of this plan stay in memory, and the whole ones.
        """
        first = self._first_difference(plan)
        whole = DropPlan(base=plan.base, shape=plan.shape)
        self._layers = {
            (number, fate): layer
            for (number, fate), layer in self._layers.items()
            if fate in (_of(plan, number), _of(whole, number))
        }
        self._before[first:] = self._run(plan, first, self._before[first])
        self._plan = plan

    def _batches(self) -> list[slice]:
        return [slice(start, start + self.batch) for start in range(0, len(self.text.tokens_NS), self.batch)]

    def _first_difference(self, plan: DropPlan) -> int:
        layers = range(self.model.shape.layers)
        return next((n for n in layers if _of(plan, n) != _of(self._plan, n)), self.model.shape.layers)

    def _run(self, plan: DropPlan, first: int, h_NSD: Tensor) -> list[Tensor]:
        """The stream [N, S, D] before each layer from `first` on, and behind the last."""
        states = [h_NSD]
        for number in range(first, self.model.shape.layers):
            if number in plan.blocks:
                states.append(states[-1])
                continue
            layer, out_NSD = self._layer(plan, number), torch.empty_like(states[-1])
            for at in self._batches():
                out_NSD[at] = block(layer, states[-1][at], self.text.mask_NS[at].to(self.mesh.device), self.mesh)
            states.append(out_NSD)
            self.progress()
        return states

    def _layer(self, plan: DropPlan, number: int) -> StreamedLayer:
        key = (number, _of(plan, number))
        if key not in self._layers:
            self._layers[key] = read_planned(self.model, number, plan, (self.mesh.expert.rank, self.mesh.expert.size))
        return self._layers[key]

    def _judge(self, h_NSD: Tensor) -> Quality:
        return self._compared(lambda at, counts_BS: self.model.logits(h_NSD[at][:, :-1][counts_BS]))

    def _compared(self, logits: Callable[[slice, Tensor], Tensor]) -> Quality:
        """`logits` gives the scores [T, V] of those tokens of a batch that have a next one."""
        sums = torch.zeros(4, dtype=torch.float64)
        for at in self._batches():
            counts_BS = self.text.mask_NS[at][:, 1:].to(self.mesh.device)
            targets_T = self.text.tokens_NS[at].to(self.mesh.device)[:, 1:][counts_BS]
            if not len(targets_T):
                continue
            log_TV = logits(at, counts_BS).float().log_softmax(-1)
            whole_TV = self.model.logits(self._dense_NSD[at][:, :-1][counts_BS]).float().log_softmax(-1)
            sums += torch.stack(
                [
                    F.nll_loss(log_TV, targets_T, reduction="sum").double(),
                    (log_TV.argmax(-1) == targets_T).double().sum(),
                    F.kl_div(log_TV, whole_TV, reduction="none", log_target=True).double().sum(),
                    torch.tensor(float(len(targets_T)), dtype=torch.float64, device=log_TV.device),
                ]
            ).cpu()
        loss, right, kl, tokens = all_reduce(sums, self.mesh.world, "quality", self.mesh.recorder).tolist()
        return Quality(loss / tokens, right / tokens, kl / tokens, int(tokens))


def _of(plan: DropPlan, layer: int) -> _Fate:
    """What `plan` makes of one layer."""
    skipped = plan.experts.get(layer, ()) if plan.semantics == "skip" else ()
    return layer in plan.blocks, layer in plan.layers, plan.kept(layer), skipped
