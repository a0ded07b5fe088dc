"""One training step, the same for every contender: forward, cross-entropy, backward, AdamW in fp32.

In bf16 the forward pass runs under autocast over fp32 weights, as `train.precision: bf16` does; a model whose weights
are bf16 already is trained through fp32 copies of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE = 1e-6
"""So small that hundreds of steps leave the routing, and so the work, as the first one found it."""


def token_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean cross-entropy in fp32, for models that answer with logits."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())


def make_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over fp32 weights, or over fp32 copies of bf16 ones."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    return MasterAdamW(model)


class MasterAdamW(torch.optim.AdamW):
    """AdamW over fp32 copies of a model's weights, which the model gets back in its own dtype."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.masters = [p.detach().float() for p in self.weights]
        super().__init__(self.masters, lr=LEARNING_RATE, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """From the gradients of the model's weights."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        super().step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the model's weights."""
        for weight in self.weights:
            weight.grad = None


class TrainingStep:
    """Trains `model` on one fixed batch; `model(inputs_BS, targets_BS)` gives the mean loss of this rank's tokens."""

    def __init__(
        self,
        model: nn.Module,
        inputs_BS: Tensor,
        targets_BS: Tensor,
        dtype: str = "fp32",
        *,
        optimizer: torch.optim.Optimizer | None = None,
        backward: Callable[[Tensor], object] = Tensor.backward,
        is_local: Callable[[nn.Parameter], bool] = lambda p: False,
    ) -> None:
        """`optimizer`: None makes one.

        `backward` leaves gradients of the mean over all ranks; `is_local` says which weights this rank alone has.
        """
        self.model = model
        self.model.train()
        self.inputs_BS = inputs_BS
        self.targets_BS = targets_BS
        self.autocast = dtype == "bf16" and all(p.dtype == torch.float32 for p in model.parameters())
        self.backward, self.is_local = backward, is_local
        self.optimizer = optimizer or make_adamw(model)

    def probe(self) -> tuple[float, float]:
        """Loss and gradient norm of the first batch, over all ranks; leaves the weights alone."""
        loss = self._backward()
        squares = torch.zeros(2, dtype=torch.float64)
        for p in self.model.parameters():
            if p.grad is not None:
                squares[int(self.is_local(p))] += p.grad.double().square().sum()
        local = torch.stack([loss.double(), squares[1]])
        ranks = 1
        if dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(local)
        self.optimizer.zero_grad()
        return local[0].item() / ranks, (squares[0] + local[1]).sqrt().item()

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
        with self._computing():
            loss = self.model(self.inputs_BS, self.targets_BS)
        self.backward(loss)
        return loss.detach()

    def _computing(self) -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
