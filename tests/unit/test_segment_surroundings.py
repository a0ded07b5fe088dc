"""Segments in models that are not ours: what is changed in place around them, and what they let go of."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wastenot.parallel.recomputation import Recomputation, Schedule


def begun(*dropped: str) -> Recomputation:
    recomputation = Recomputation(Schedule(frozenset(dropped)))
    recomputation.begin(nn.Module())
    return recomputation


def leaf() -> Tensor:
    return torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()


READS: dict[str, Callable[[Tensor], Tensor]] = {"argument": lambda h: (h + 0).sin(), "saved": torch.sin}
"""What the segment needs of its argument: all of it again, or only what autograd saved."""


@pytest.mark.parametrize("read", READS)
def test_an_argument_that_changes_after_forward_is_an_error(read):
    """Autograd finds such a change by itself, but not through hooks."""
    h = leaf() * 1
    y = begun("part").segment("part", READS[read], h)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match=r"segment part: \[5\] torch.float64 .* changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("dropped", [("first",), ("second",), ("first", "second")])
def test_an_output_that_changes_before_the_next_segment_is_that_segment_s_argument(dropped):
    """As `x += f(x)` does: computed again, the first segment gives what there was before."""

    def function(x: Tensor, recomputation: Recomputation) -> Tensor:
        y = recomputation.segment("first", lambda x: x.square() * x, x)
        y += x
        return recomputation.segment("second", lambda y: (y * y).exp(), y)

    x = leaf()
    plain = function(x, begun())
    expected = torch.autograd.grad(plain.sum(), x)
    found = function(x, begun(*dropped))
    assert found.equal(plain)
    assert torch.autograd.grad(found.sum(), x)[0].equal(expected[0])


def test_a_forward_without_backward_is_let_go_of():
    """Though a kept segment behind a dropped one saves what it gives."""
    recomputation = begun("first")
    y = recomputation.segment("second", torch.exp, recomputation.segment("first", torch.sin, leaf() * 1))
    memory = weakref.ref(y.untyped_storage())
    del y
    recomputation.begin(nn.Module())
    assert memory() is None


def test_what_was_computed_again_is_let_go_of_once_backward_has_used_it():
    """Though the graph of the recomputation saves what it gives."""
    memory: list[weakref.ref[torch.UntypedStorage]] = []
    alive: list[bool] = []

    def function(x: Tensor) -> Tensor:
        inner = (x * 2).exp()
        memory.append(weakref.ref(inner.untyped_storage()))
        return inner.sin()

    x = leaf()
    y = begun("part").segment("part", function, x)
    x.register_hook(lambda grad: alive.extend(each() is not None for each in memory))
    y.sum().backward()
    assert len(memory) == 2, "is computed again"
    assert alive == [False, False]
