"""One training step, the same for every contender: forward, cross-entropy, backward, AdamW in fp32."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def token_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean cross-entropy, for models that answer with logits."""
    return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())


class TrainingStep:
    """Trains `model` on one fixed batch; `model(inputs_BS, targets_BS)` gives the mean loss."""

    def __init__(self, model: nn.Module, inputs_BS: Tensor, targets_BS: Tensor) -> None:
        self.model = model.train()
        self.inputs_BS = inputs_BS
        self.targets_BS = targets_BS
        # A step so small that hundreds of them leave the routing, and so the work, as the first one found it.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def probe(self) -> tuple[float, float]:
        """Loss and gradient norm of the first batch; leaves the weights alone."""
        loss = self._backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.double().norm() for g in gradients]))
        self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def run(self) -> float:
        """Does one step and returns its seconds."""
        start = time.perf_counter()
        self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def close(self) -> None:
        """Nothing to release in this process."""

    def _backward(self) -> Tensor:
        loss = self.model(self.inputs_BS, self.targets_BS)
        loss.backward()
        return loss.detach()
