"""The output layer and its loss against a teacher in one, so that neither model's logits need be kept."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, implementation
from . import naive, vectorised

__all__ = ["linear_distillation"]


def linear_distillation(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TD: Tensor,
    teacher_weight_VD: Tensor,
    targets_T: Tensor,
    mix: float,
    temperature: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - mix) * cross-entropy + mix * temperature^2 * KL(teacher || student), and these two sums over tokens.

    The cross-entropy is that of `cross_entropy.linear_cross_entropy`, bit for bit where mix is 0. The divergence is of
    the two softmaxes at `temperature`, whose square keeps its gradient as large (Hinton et al., arXiv 1503.02531).
    Targets of -100 count in neither. All three are fp32 or wider. Only the first is differentiable, once, in hidden
    states and weight of the student; the teacher's may have another width.
    """
    chosen = naive if implementation(backend, hidden_TD.device) == "reference" else vectorised
    return chosen.linear_distillation(
        hidden_TD, weight_VD, teacher_hidden_TD, teacher_weight_VD, targets_T, mix, temperature
    )
