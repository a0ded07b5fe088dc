"""Any asynchronous collective as a differentiable function, with something to do before each wait.

    windowed(tensor, start, start_gradient, during)     forward starts one collective, backward another
    sum_terms, sum_gradients                            the two of tensor parallelism, each the other's gradient

Nothing else runs between start and wait. Where the caller's own work is to run there, forward and backward, see
`start_all_to_all` (collectives.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .events import Recorder, Recorders
from .ranges import named
from .recomputation import During, nothing
from .stopwatch import Stopwatch, Underway


def _as_it_came(received: Tensor) -> Tensor:
    return received


@dataclass
class Journey:
    """A collective on its way: `land` waits for it, once."""

    work: dist.Work | None
    """None: it is done."""
    received: Tensor
    """Whole once it is done."""
    sent: Tensor | None = None
    """Lives until it is done."""
    unpack: Callable[[Tensor], Tensor] = _as_it_came
    """From what arrived to what was asked for."""
    name: str = ""
    recorder: Recorder = field(default_factory=Recorders)
    """Hears how long the wait was."""

    def __post_init__(self) -> None:
        self._underway = Underway([self.work], self.received.device)

    def land(self, during: During = nothing) -> Tensor:
        """What it brings, after `during`."""
        during(lambda: self.work is None or self.work.is_completed())
        hidden, watch = self._underway.hidden(), Stopwatch(self.received.device)
        with named(f"wait {self.name}"):
            if self.work is not None:
                self.work.wait()
        self.recorder.collective_left(self.name, watch.stop(), hidden)
        return self.unpack(self.received)


Start = Callable[[Tensor], Journey]
"""start(tensor): starts a collective and returns at once; `tensor` stays as it is, and may be what it brings."""


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, start, start_gradient, during):
        ctx.start, ctx.during = start_gradient, during[1]
        return start(tensor).land(during[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return ctx.start(grads[0]).land(ctx.during), None, None, None


def windowed(
    tensor: Tensor, start: Start, start_gradient: Start, during: tuple[During, During] = (nothing, nothing)
) -> Tensor:
    """What `start` brings of `tensor`; its gradient is what `start_gradient` brings of the gradient of that.

    `during` is done before forward and backward wait: `Recomputation.window` gives it. All ranks of a collective call
    in one order, and backward goes through it on all of them. Not differentiable twice.
    """
    return _Windowed.apply(tensor, start, start_gradient, during)  # pyright: ignore[reportReturnType]


def sum_terms(term: Tensor, group: dist.ProcessGroup | None = None, during: During = nothing) -> Tensor:
    """Sum of every rank's `term` over `group` (None: all ranks), with which all of them go on alike.

    The gradient, the same on all ranks, passes. `during` is done before forward waits. (Megatron's g, arXiv 1909.08053,
    section 3.)
    """
    return windowed(term, lambda term: _start_sum(term, group), _stay, (during, nothing))


def sum_gradients(x: Tensor, group: dist.ProcessGroup | None = None, during: During = nothing) -> Tensor:
    """`x` as it is, the same on all ranks, with which each goes on in its own way: to a term, for `sum_terms`.

    Gradients are summed over `group` (None: all ranks). `during` is done before backward waits. (Megatron's f.)
    """
    return windowed(x, _stay, lambda grad: _start_sum(grad, group), (nothing, during))


def _start_sum(term: Tensor, group: dist.ProcessGroup | None) -> Journey:
    total = term.clone(memory_format=torch.contiguous_format)
    return Journey(dist.all_reduce(total, group=group, async_op=True), total)


def _stay(tensor: Tensor) -> Journey:
    return Journey(None, tensor)
