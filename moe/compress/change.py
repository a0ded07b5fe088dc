"""What `slim` and `quantize` of a plan do to each weight of a checkpoint: the `transform` of apply.

    apply_plan(source, target, plan, transform=weight_change(plan, read_profile(plan_profile)))

Slimming changes matrices of experts, quantizing those of all linear layers within blocks. Which those are is a matter
of a tensor's place, never of a part of its name, so that a router stays as it is in every family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import quantize
from .places import Place
from .plan import DropPlan, Slim
from .profile import Profile
from .slim import ExpertSums, slim
from .sparsegpt import check_pattern

__all__ = ["WeightChange", "weight_change"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_change(plan: DropPlan, profile: Profile | None = None) -> WeightChange | None:
    """None where `plan` changes no weight.

    profile: that of `plan.profile`. With sums of x x^T in it experts that are not slimmed are rounded by GPTQ; all
        else to the nearest, which keeps zeros.
    Raises ValueError where it is missing, another one, or lacks what `plan.slim` needs.
    """
    if not plan.slim and not plan.quantize:
        return None
    if profile is not None and profile.fingerprint != plan.profile:
        raise ValueError(f"profile: the plan rests on {plan.profile or 'none'}, and this is {profile.fingerprint}")
    if profile is None and plan.slim and plan.slim.method != "magnitude":
        raise ValueError(f"slim: {plan.slim.method} needs the profile that the plan was made with; give it")
    if profile is not None and plan.slim and plan.slim.method == "sparsegpt" and not profile.config.hessians:
        raise ValueError("slim: sparsegpt needs sums of x x^T; profile again with --hessians, or use wanda")
    return WeightChange(plan, profile)


class WeightChange:
    """Slims and quantizes one matrix at a time, by its place in the source."""

    def __init__(self, plan: DropPlan, profile: Profile | None) -> None:
        self._plan, self._profile = plan, profile
        self.rests_on = "" if profile is None else profile.fingerprint
        """Fingerprint of the profile that is there: a plan may be applied with it or without."""
        self._method = self._judge()
        self._layer: tuple[int, ExpertSums] | None = None
        self.starved: dict[int, set[int]] = {}
        """Layer -> experts that had too few tokens to be judged by these alone. Grows with what is changed."""

    def __call__(self, place: Place, name: str, weight_OI: Tensor) -> Mapping[str, Tensor]:
        """What stands for the matrix `name` at `place`: itself, slimmed or not, or `<name>.q` and `<name>.scale`.

        Raises ValueError where groups do not divide its inputs, or it holds what is no number.
        """
        if not place.is_linear:
            return {name: weight_OI}
        if weight_OI.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: is stored in {weight_OI.dtype}, part of its value elsewhere; give it in bf16 or fp32"
            )
        try:
            return self._changed(place, name, weight_OI)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def check(self, place: Place, name: str, shape: Sequence[int]) -> None:
        """Raises ValueError where matrices, or a stack of them, of that shape [..., O, I] cannot be changed so."""
        if not place.is_linear:
            return
        try:
            if self._plan.slim and place.part in ("expert", "experts"):
                check_pattern(shape[-1], self._plan.slim.pattern)
            if self._plan.quantize:
                quantize.check_groups(shape[-1], self._plan.quantize)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _changed(self, place: Place, name: str, weight_OI: Tensor) -> Mapping[str, Tensor]:
        how, few = self._plan.slim, self._plan.quantize
        sums = self._sums(place) if self._method and place.part == "expert" else None
        if how and place.part == "expert":
            weight_OI = slim(weight_OI, how, sums)
        if few is None:
            return {name: weight_OI}
        if sums is None or how is not None:
            q, scale = quantize.nearest(weight_OI, few)
        else:
            q, scale = quantize.gptq(weight_OI, sums, few)
        return {f"{name}.q": q, f"{name}.scale": scale}

    def _judge(self) -> Slim | None:
        """By which sums the weights of experts are judged."""
        if self._plan.slim:
            return self._plan.slim if self._plan.slim.method != "magnitude" else None
        return Slim(method="sparsegpt") if self._profile and self._profile.config.hessians else None

    def _sums(self, place: Place) -> Tensor:
        assert place.layer is not None and place.expert is not None
        if self._layer is None or self._layer[0] != place.layer:
            self._layer = (place.layer, self._read(place.layer))
        found = self._layer[1]
        if found.is_starved(place.expert, place.weight):
            self.starved.setdefault(place.layer, set()).add(place.expert)
        return found(place.expert, place.weight)

    def _read(self, layer: int) -> ExpertSums:
        profile = self._profile
        assert profile is not None and self._method is not None
        sums = profile.layers[layer]
        if self._method.method == "wanda":
            return ExpertSums(sums["routed_E"], sums["input_sq_ED"].__getitem__, sums["hidden_sq_EF"].__getitem__)
        # Read one at a time: of all experts they are larger than the layer.
        return ExpertSums(
            sums["routed_E"],
            lambda expert: profile.hessian(layer, expert, "hessian_in_DD"),
            lambda expert: profile.hessian(layer, expert, "hessian_hidden_FF"),
        )
