"""Reference of the loss against a teacher: all logits of both models at once, differentiated by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_distillation(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TD: Tensor,
    teacher_weight_VD: Tensor,
    targets_T: Tensor,
    mix: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - mix) * cross-entropy + mix * temperature^2 * KL(teacher || student), and these two sums over tokens."""
    logits_TV = _wide(F.linear(hidden_TD, weight_VD))
    taught_TV = _wide(F.linear(teacher_hidden_TD, teacher_weight_VD)).detach()
    nats = F.cross_entropy(logits_TV, targets_T, reduction="sum", ignore_index=-100)
    counted = targets_T >= 0
    student, teacher = ((x_TV[counted] / temperature).log_softmax(-1) for x_TV in (logits_TV, taught_TV))
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return (1 - mix) * nats + mix * temperature**2 * divergence, nats.detach(), divergence.detach()


def _wide(logits_TV: Tensor) -> Tensor:
    return logits_TV.float() if logits_TV.dtype.itemsize < 4 else logits_TV
