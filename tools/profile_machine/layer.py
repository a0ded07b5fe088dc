"""One layer of a run, as training runs it, operator by operator: seconds by the names of the cost model.

The layer is the run's own `Block` on this run's ranks, its tokens are noise, and they go to experts as the question's
skew says; the gate computes, but its choice is replaced by that. A name of the cost model that no stage has, or a stage
that no name stands for, is settled by `by_names`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.combine import combine
from ...kernels.dispatch import permute, reorder
from ...kernels.gate import gate
from ...launch.config import TrainConfig
from ...launch.precision import computing_in, weight_dtype
from ...moe.attention import Attention, rotary_table, rotate
from ...moe.decoder import Block, initialiser
from ...moe.dispatcher import DispatchHandle
from ...moe.feedforward import SwiGLU
from ...moe.layer import MoELayer
from ...moe.norm import RMSNorm
from ...moe.router import route
from ...moe.skew import balanced_logits, zipf_logits
from ...parallel.apply import parallelize
from ...parallel.collectives import start_all_to_all
from ...parallel.lynx.problem import Layer
from ...parallel.lynx.routing_skew import Skew
from ...parallel.lynx.shape import LayerKind
from ...parallel.mesh import Mesh
from ...parallel.stopwatch import StreamWait
from .tape import Tape

SPLIT = {
    "experts": ("expert up", "expert activation", "expert down"),
}
"""Stages that are one call, and the operators in it."""

_BACKWARD = " backward"

Times = list[tuple[str, float]]
"""Stages in their order, and seconds."""


@dataclass
class Waits:
    """A recorder that adds up how long this rank stood still, by the collective's name."""

    told: list[tuple[str, float | StreamWait]] = field(default_factory=list)

    def collective_entered(self, name: str, num_bytes: int) -> None:
        """Nothing yet."""

    def collective_left(self, name: str, waited: float | StreamWait, hidden: float = 0.0) -> None:
        """`name` ended."""
        self.told.append((name, waited))

    def take(self, ending: str) -> float:
        """Seconds of collectives whose names end so, since the last call."""
        found = [waited for name, waited in self.told if name.endswith(ending)]
        self.told.clear()
        return float(sum(waited.seconds() if isinstance(waited, StreamWait) else waited for waited in found))


class TimedLayer:
    """A block of the run's own model, ready to be timed."""

    def __init__(self, config: TrainConfig, kind: LayerKind, skew: Skew, mesh: Mesh, piece_bytes: int) -> None:
        """All ranks of `mesh` build it together, and make the same calls. `mesh.recorder` is a `Waits`."""
        model = config.model
        number = next(i for i in range(model.layers) if model.is_moe(i) == (kind == "moe"))
        with torch.device("meta"):
            block = Block(model, config.router, number, mesh, piece_bytes, config.kernels)
        self.mesh, self.config, self.skew = mesh, config, skew
        parallelize(block, mesh, initialiser(model), config.train.seed, weight_dtype(config.train.precision))
        self.block = block.train()
        for weight in block.parameters():
            # As `parallel/gradients.py` keeps them: there before the backward, which adds to them.
            weight.grad = torch.zeros_like(weight)
        sequences = config.train.batch // config.train.accumulate
        generator = torch.Generator().manual_seed(mesh.world.rank)
        size = (sequences, config.data.seq_len, model.d_model)
        self.x_BSD, self.grad_BSD = (torch.randn(size, generator=generator).to(mesh.device) for _ in range(2))
        positions = torch.arange(config.data.seq_len, device=mesh.device)
        self.table = rotary_table(positions, model.head_width, model.rope_theta, torch.float32)

    def run(self) -> Times:
        """One forward and one backward. What routing waits for counts of rows is a stage of its own, `counts`."""
        tape, waits = Tape(self.mesh.device), self.mesh.recorder
        assert isinstance(waits, Waits)
        waits.told.clear()
        with computing_in(self.config.train.precision, self.mesh.device):
            if self._is_autocast:
                # Its cache would take leaves between stages for weights, and cast them once for all who read them.
                torch.set_autocast_cache_enabled(False)
            x_BSD = tape.leaf(self.x_BSD)
            tape.start()
            (y_BSD,) = self._attention(tape, x_BSD)
            norm, ffn = self.block.ffn_norm, self.block.ffn
            assert norm is not None and ffn is not None, "no kind of layer only attends"
            if isinstance(ffn, MoELayer):
                self._moe(tape, y_BSD, norm, ffn)
            else:
                self._dense(tape, y_BSD, norm, ffn)
        tape.backward(self.grad_BSD)
        return _without_counts(tape.seconds(), waits.take("dispatch-counts"))

    def _attention(self, tape: Tape, x_BSD: Tensor) -> tuple[Tensor, ...]:
        attention: Attention = self.block.attention
        B, S, _ = x_BSD.shape
        heads, kv_heads, width = attention.heads, attention.kv_heads, attention.width
        (h_BSD,) = tape.step("norm 1", self.block.attention_norm, x_BSD, of=[self.block.attention_norm])
        q, k = tape.step(
            "query and key", lambda h: (attention.q(h), attention.k(h)), h_BSD, of=[attention.q, attention.k]
        )
        q_norm, k_norm = attention.q_norm, attention.k_norm

        def norm(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            assert q_norm is not None and k_norm is not None
            if not attention.norm_per_head:
                return q_norm(q), k_norm(k)
            return (
                q_norm(q.view(B, S, heads, width)).view_as(q),
                k_norm(k.view(B, S, kv_heads, width)).view_as(k),
            )

        if q_norm is not None and k_norm is not None:
            q, k = tape.step("query and key norm", norm, q, k, of=[q_norm, k_norm])
        q, k = tape.step(
            "rotary",
            lambda q, k: (
                rotate(q.view(B, S, heads, width), self.table),
                rotate(k.view(B, S, kv_heads, width), self.table),
            ),
            q,
            k,
        )
        (v,) = tape.step("value", attention.v, h_BSD, of=[attention.v])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v.view(B, S, kv_heads, width)))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
            return y.transpose(1, 2).reshape(B, S, -1)

        (y,) = tape.step("attention", attend, q, k, v)
        (y_BSD,) = tape.step("projection", attention.out, y, of=[attention.out])
        return tape.step("residual 1", lambda x, y: x + y, x_BSD, y_BSD)

    def _swiglu(self, tape: Tape, h: Tensor, ffn: SwiGLU, prefix: str) -> tuple[Tensor, ...]:
        gate, up = tape.step(f"{prefix}up", lambda h: (ffn.gate(h), ffn.up(h)), h, of=[ffn.gate, ffn.up])
        (hidden,) = tape.step(f"{prefix}activation", lambda gate, up: F.silu(gate) * up, gate, up)
        return tape.step(f"{prefix}down", ffn.down, hidden, of=[ffn.down])

    def _dense(self, tape: Tape, x_BSD: Tensor, norm: RMSNorm, ffn: SwiGLU) -> None:
        (h_BSD,) = tape.step("norm 2", norm, x_BSD, of=[norm])
        (y_BSD,) = self._swiglu(tape, h_BSD, ffn, "")
        tape.step("residual 2", lambda x, y: x + y.to(x.dtype), x_BSD, y_BSD)

    def _moe(self, tape: Tape, x_BSD: Tensor, norm: RMSNorm, ffn: MoELayer) -> None:
        dispatcher, axis, recorder = ffn.dispatcher, self.mesh.expert, self.mesh.recorder
        backend, router, experts = dispatcher.backend, ffn.router, ffn.experts
        forced_TE = self._logits(x_BSD.shape[0] * x_BSD.shape[1], ffn)
        (h_TD,) = tape.step("norm 2", lambda x: norm(x).flatten(0, -2), x_BSD, of=[norm])
        (logits_TE,) = tape.step("router", lambda h: self._gate(h, ffn), h_TD, of=[router], replaced=forced_TE)
        handles: list[DispatchHandle] = []

        def decide(logits_TE: Tensor) -> Tensor:
            routing = route(logits_TE, router.config, ffn.mixer.blocks, False, router.bias_E, router.backend)
            routing = ffn.mixer.rectify(routing)
            width = torch.get_autocast_dtype(h_TD.device.type).itemsize if self._is_autocast else h_TD.element_size()
            handles.append(dispatcher.plan(routing, h_TD.size(-1) * width))
            return handles[0].weights_TK

        (weights_TK,) = tape.step("routing", decide, logits_TE)
        handle = handles[0]

        def spread(h_TD: Tensor) -> Tensor:
            if self._is_autocast:
                h_TD = h_TD.to(torch.get_autocast_dtype(h_TD.device.type))
            return permute(h_TD, handle.source_N, handle.position_TK, handle.may_be_empty, backend)

        (rows,) = tape.step("permute", spread, h_TD)
        order_R, inverse_R = handle.order_R, handle.inverse_R
        if axis.group is not None:
            (rows,) = tape.step(
                "dispatch", lambda rows: start_all_to_all(rows, handle.splits, axis, "dispatch", recorder).wait(), rows
            )
        if order_R is not None and inverse_R is not None:
            (rows,) = tape.step("sort rows", lambda rows: reorder(rows, order_R, inverse_R, backend), rows)
        (rows,) = tape.step("experts", lambda rows: experts(rows, handle.offsets_e), rows, of=[experts])
        if order_R is not None and inverse_R is not None:
            (rows,) = tape.step("unsort rows", lambda rows: reorder(rows, inverse_R, order_R, backend), rows)
        if axis.group is not None:
            back = handle.splits.reversed()
            (rows,) = tape.step(
                "combine", lambda rows: start_all_to_all(rows, back, axis, "combine", recorder).wait(), rows
            )
        (y_TD,) = tape.step(
            "weighted sum",
            lambda rows, weights: combine(
                rows, weights, handle.position_TK, handle.source_N, handle.may_be_empty, backend
            ),
            rows,
            weights_TK,
        )
        if ffn.shared is not None:
            (shared_TD,) = self._swiglu(tape, h_TD, ffn.shared, "shared ")
            (y_TD,) = tape.step("both", lambda y, shared: y + shared, y_TD, shared_TD)
        tape.step("residual 2", lambda x, y: x + y.view_as(x).to(x.dtype), x_BSD, y_TD)

    @property
    def _is_autocast(self) -> bool:
        return torch.is_autocast_enabled(self.mesh.device.type)

    def _gate(self, h_TD: Tensor, ffn: MoELayer) -> Tensor:
        with torch.autocast(h_TD.device.type, enabled=False):
            return gate(h_TD, ffn.router.weight, ffn.mixer.blocks, ffn.router.backend)

    def _logits(self, tokens: int, ffn: MoELayer) -> Tensor:
        """That make the skew; the same on every rank."""
        experts, top_k = ffn.router.num_experts, ffn.router.config.top_k
        if self.skew.exponent:
            made = zipf_logits(tokens, experts, self.skew.exponent)
        else:
            made = balanced_logits(tokens, experts, top_k)
        return made.to(self.mesh.device, ffn.router.weight.dtype)


def _without_counts(stages: Times, counts: float) -> Times:
    found: Times = []
    for name, seconds in stages:
        if name == "routing" and counts:
            found += [(name, max(0.0, seconds - counts)), ("counts", counts)]
        else:
            found.append((name, seconds))
    return found


def slowest(of_ranks: Sequence[Times]) -> dict[str, float]:
    """One pass of all ranks: between exchanges, the stages of the rank that took longest; exchanges without waiting.

    Who comes last to an exchange does not wait for the others there.
    """
    found: dict[str, float] = {}
    segment: list[Times] = [[] for _ in of_ranks]

    def close() -> None:
        longest = max(segment, key=lambda stages: sum(seconds for _, seconds in stages))
        found.update(longest)
        for stages in segment:
            stages.clear()

    for at in zip(*of_ranks, strict=True):
        name = at[0][0]
        if name.removesuffix(_BACKWARD) in ("dispatch", "combine", "counts"):
            close()
            found[name] = min(seconds for _, seconds in at)
        else:
            for stages, stage in zip(segment, at, strict=True):
                stages.append(stage)
    close()
    return found


def typical(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by stage, in order, which add up to the median of whole passes, shared out by the stages' medians.

    Where other programs take turns on the cores, a stage is seldom disturbed and a whole pass always is: medians of
    stages alone would add up to a pass that never happens.
    """
    found = {name: median(each[name] for each in passes) for name in passes[0]}
    whole = median(sum(each.values()) for each in passes)
    return {name: seconds * whole / sum(found.values()) for name, seconds in found.items()}


def by_names(stages: Mapping[str, float], layer: Layer) -> dict[str, float]:
    """Seconds of stages, in their order, by the names of `layer`'s operators, backward operators and windows.

    `counts` is part of dispatch, as the cost model has it. A stage of several operators is shared out as the cost model
    has them. A stage that no name stands for goes with the operator before it, in the backward with the one after it:
    where the gradient goes next.
    """
    stages = dict(stages)
    counts = stages.pop("counts", 0.0)
    if counts:
        stages["dispatch"] += counts
    forward = {name: seconds for name, seconds in stages.items() if not name.endswith(_BACKWARD)}
    backward = {name.removesuffix(_BACKWARD): seconds for name, seconds in stages.items() if name.endswith(_BACKWARD)}
    operators = {each.name: each.seconds for each in layer.operators}
    gradients = {each.name: each.seconds for each in layer.backward}
    # A stage that exchanges is a window in the backward, under another name than an operator's.
    of_stage = {name.removesuffix(_BACKWARD).removesuffix(" gradient"): name for name in gradients}
    shared = _shared_out(backward, {stage: gradients[name] for stage, name in of_stage.items()})
    in_backward = {of_stage.get(stage, stage): seconds for stage, seconds in shared.items()}
    return _settled(_shared_out(forward, operators), operators, with_next=False) | _settled(
        in_backward, gradients, with_next=True
    )


def _shared_out(stages: Mapping[str, float], predicted: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, seconds in stages.items():
        parts = [part for part in SPLIT.get(name, ()) if part in predicted]
        whole = sum(predicted[part] for part in parts)
        if whole:
            found.update({part: seconds * predicted[part] / whole for part in parts})
        else:
            found[name] = seconds
    return found


def _settled(stages: Mapping[str, float], known: Mapping[str, float], *, with_next: bool) -> dict[str, float]:
    """Those of `stages` that are known; the others are added to a neighbour that is."""
    found: dict[str, float] = {}
    waiting, last = 0.0, ""
    for name, seconds in stages.items():
        if name in known:
            found[name] = seconds + waiting
            waiting, last = 0.0, name
        elif with_next or not last:
            waiting += seconds
        else:
            found[last] += seconds
    if waiting and last:
        found[last] += waiting
    return found
