"""Gradients on one process: what the ranks' tests cannot see."""

from __future__ import annotations

import gc
import weakref

import torch

from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import single


def test_model_and_gradients_are_freed_when_dropped():
    model = torch.nn.Linear(3, 2)
    gradients = Gradients(model, single())
    with gradients.reduced():
        model(torch.ones(1, 3)).sum().backward()
    kept = weakref.ref(gradients)
    del model, gradients
    gc.collect()
    assert kept() is None


def test_gradients_are_summed_into_their_buffer_while_somebody_holds_it():
    model = torch.nn.Linear(3, 2)
    gradients = Gradients(model, single())
    for _ in range(2):
        with gradients.reduced():
            model(torch.ones(1, 3)).sum().backward()
    assert gradients.norm().item() == torch.full((8,), 2.0).norm().item()
