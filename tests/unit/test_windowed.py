"""A windowed collective is the plain one, forward and backward, and waits only after what is to be done before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from wastenot.parallel.recomputation import During, Recomputation, Schedule
from wastenot.parallel.windowed import Journey, windowed


@dataclass
class Late:
    """Work of a collective that brings nothing before it is waited for."""

    name: str
    received: Tensor
    brings: Tensor
    log: list[str]
    future: torch.futures.Future = field(default_factory=torch.futures.Future)

    def is_completed(self) -> bool:
        return self.future.done()

    def get_future(self) -> torch.futures.Future:
        return self.future

    def wait(self) -> None:
        self.log.append(f"{self.name} lands")
        self.received.copy_(self.brings)
        self.future.set_result(None)


def late(matrix: Tensor, name: str, log: list[str]) -> Callable[[Tensor], Journey]:
    """A collective, as far as one process can tell: it brings `matrix` times the tensor, later."""

    def start(tensor: Tensor) -> Journey:
        log.append(f"{name} starts")
        brings = matrix @ tensor
        received = torch.full_like(brings, torch.nan)
        work: Any = Late(name, received, brings, log)
        return Journey(work, received)

    return start


def noted(name: str, log: list[str]) -> During:
    """Writes down when it is done, and whether what is waited for has arrived."""
    return lambda arrived: log.append(f"{name}, {'arrived' if arrived() else 'on its way'}")


def test_gradients_are_what_the_other_collective_brings():
    matrix = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return windowed(x.sin(), late(matrix, "out", []), late(matrix.t(), "back", []))

    assert function(x).equal(matrix @ x.sin())
    assert torch.autograd.gradcheck(function, x)


def test_a_window_lies_between_start_and_wait_in_both_directions():
    log: list[str] = []
    eye, x = torch.eye(3), torch.randn(3, 4, requires_grad=True)
    during = noted("forward", log), noted("backward", log)
    y = windowed(x, late(eye, "out", log), late(eye, "back", log), during)
    forward = ["out starts", "forward, on its way", "out lands"]
    assert log == forward
    y.sum().backward()
    assert log == [*forward, "back starts", "backward, on its way", "back lands"]


def test_what_needs_no_wait_has_arrived():
    log: list[str] = []
    during = noted("forward", log), noted("backward", log)
    x = torch.randn(3, requires_grad=True)
    y = windowed(x, lambda x: Journey(None, x), lambda grad: Journey(None, 2 * grad), during)
    assert y.equal(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 3
    assert log == ["forward, arrived", "backward, arrived"]


def test_without_gradients_only_the_first_is_sent():
    log: list[str] = []
    with torch.no_grad():
        windowed(torch.ones(2, 1), late(torch.eye(2), "out", log), late(torch.eye(2), "back", log))
    assert log == ["out starts", "out lands"]


def test_buffers_live_until_they_have_landed_and_no_longer():
    sent: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def start(tensor: Tensor) -> Journey:
        copy = tensor.clone()
        sent.append(weakref.ref(copy))
        return Journey(None, tensor * 3, copy, unpack=lambda received: received / 3)

    def during(arrived: Callable[[], bool]) -> None:
        gc.collect()
        alive.append(sent[-1]() is not None)

    x = torch.randn(4, requires_grad=True)
    y = windowed(x, start, start, (during, during))
    assert alive == [True]
    gc.collect()
    assert sent[0]() is None, "though the graph is there"
    y.sum().backward()
    assert alive == [True, True]


def test_a_second_derivative_is_refused():
    """Its collectives would be missing."""
    x = torch.randn(3, 1, requires_grad=True)
    y = windowed(x, late(torch.eye(3), "out", []), late(torch.eye(3), "back", []))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_goes_through_unchanged_is_still_the_output_of_its_segment():
    """So that a dropped segment behind it does not keep it, and both are computed again in its window."""
    log: list[str] = []

    def drawn(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: log.append(name) or function(x)

    recomputation = Recomputation(Schedule(frozenset({"norm", "part"}), {"above": ("norm", "part")}))
    recomputation.begin(torch.nn.Module())
    x = torch.randn(3, 3, requires_grad=True)
    normed = recomputation.segment("norm", drawn("norm", torch.sin), x)
    copied = windowed(normed, lambda x: Journey(None, x), late(torch.eye(3), "back", log))
    y = recomputation.segment("part", drawn("part", lambda x: (x * 2).exp().square()), copied)
    memory = weakref.ref(normed.untyped_storage())
    assert memory() is not None
    del normed, copied
    gc.collect()
    assert memory() is None
    stay = late(torch.eye(3), "above", log)
    windowed(y, lambda y: Journey(None, y), stay, (noted("", []), recomputation.window("above"))).sum().backward()
    assert log == ["norm", "part", "above starts", "norm", "part", "above lands", "back starts", "back lands"]
    expected = torch.autograd.grad((x.sin() * 2).exp().square().sum(), x)
    assert x.grad is not None
    assert x.grad.equal(expected[0])
