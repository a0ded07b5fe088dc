"""Which optimizer a run uses, and its settings. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class AdapproxConfig:
    """Adapprox (METHODS A1-A9; arXiv 2403.14958): second moments of matrices as low-rank factors."""

    bias_correction: bool = True
    """As AdamW's; the paper has none, and longer first steps."""
    momentum: Literal["fp32", "bf16", "int8", "none"] = "fp32"
    """How the first moment is stored; `none` does without one."""
    start: Literal["warm", "gaussian"] = "warm"
    """Where the subspace iteration starts: from the factors of the step before, or from noise as in the paper."""
    max_rank: float = 0.25
    """Largest rank, as a part of a matrix's smaller side."""
    rank_threshold: float = 0.01
    """The rank grows until the relative error of the factors is within this."""
    rank_every: int = 10
    """Steps between searches for the rank."""
    clamp: Literal["exact", "none"] = "exact"
    """Negative entries of the factors' product count as 0 (A6), or as they are, which is faster."""
    guidance: bool = False
    """Scale the step by how much the update agrees with the first moment (A4)."""
    clip_threshold: float = 1.0
    """Updates of a larger root mean square are scaled down to it."""
    true_error: bool = False
    """Keep second moments whole as well, only to report how far the factors are from them: 4 bytes a weight."""

    def __post_init__(self) -> None:
        if not 0 < self.max_rank <= 1:
            nearest = 1.0 if self.max_rank > 1 else 0.25
            raise ValueError(f"max_rank: {self.max_rank} is outside (0, 1]; use {nearest}")
        if not 0 < self.rank_threshold < 1:
            raise ValueError(f"rank_threshold: {self.rank_threshold} is outside (0, 1); use for example 0.01")
        if self.rank_every < 1:
            raise ValueError(f"rank_every: {self.rank_every} is too small; use 1 or more")
        if self.clip_threshold <= 0:
            raise ValueError(f"clip_threshold: {self.clip_threshold} is not positive; use for example 1.0")
        if self.guidance and self.momentum == "none":
            raise ValueError("guidance: true has no effect with momentum: none; use false")


@dataclass(frozen=True, kw_only=True)
class ApolloConfig:
    """APOLLO (arXiv 2412.05270): step sizes per channel, from moments of randomly projected gradients."""

    rank: float = 0.25
    """Rank of the projection, as a part of a matrix's smaller side."""
    refresh_every: int = 200
    """Steps between new projections."""

    def __post_init__(self) -> None:
        if not 0 < self.rank <= 1:
            nearest = 1.0 if self.rank > 1 else 0.25
            raise ValueError(f"rank: {self.rank} is outside (0, 1]; use {nearest}")
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every: {self.refresh_every} is too small; use 1 or more")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer by name, what all share, and a section for each that has settings of its own."""

    name: Literal["adamw", "adafactor", "adamw8bit", "adapprox", "apollo", "came", "muon"] = "adamw"
    """Which weights each takes, and whose implementation runs: `launch/optimizer.py`."""
    lr: float = 3e-4
    """Peak learning rate. Adafactor's is relative to the root mean square of a parameter: use for example 1e-2."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only; norms and biases are left alone."""
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    adapprox: AdapproxConfig = field(default_factory=AdapproxConfig)
    apollo: ApolloConfig = field(default_factory=ApolloConfig)

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive; use for example 3e-4")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is outside [0, 1); use for example 0.9")
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; use 0 (off) or more")
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        usual = {f.name: f.default for f in fields(self)}
        for name in _UNUSED.get(self.name, ()):
            if getattr(self, name) != usual[name]:
                raise ValueError(
                    f"{name}: {getattr(self, name)} has no effect with name: {self.name}; use {usual[name]}"
                )
        if self.name == "adapprox" and self.adapprox.momentum == "none" and self.beta1 != usual["beta1"]:
            raise ValueError(f"beta1: {self.beta1} has no effect with momentum: none; use {usual['beta1']}")
        for name, section in (("adapprox", AdapproxConfig()), ("apollo", ApolloConfig())):
            if name != self.name and getattr(self, name) != section:
                raise ValueError(
                    f"{name}: its settings have no effect with name: {self.name}; use name: {name}, or none"
                )


_UNUSED: Mapping[str, tuple[str, ...]] = {"adafactor": ("beta1", "beta2", "eps"), "came": ("eps",)}
"""Shared fields that an optimizer has no use for: Adafactor's decay follows the step, both have their own epsilons."""

_NEEDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "came": ("optimizers", ("came_pytorch",)),
    "adamw8bit": ("optimizers", ("torchao",)),
    # Its package imports the last two whatever is taken from it.
    "apollo": ("apollo", ("apollo_torch", "bitsandbytes", "transformers")),
}
"""The extra that brings an optimizer, and the modules that must be there."""


def what_is_missing(name: str) -> str:
    """What must be installed before the optimizer `name` can be made, as one sentence; empty where nothing must."""
    extra, modules = _NEEDS.get(name, ("", ()))
    missing = [module for module in modules if find_spec(module) is None]
    if not missing:
        return ""
    return f"{name} needs {', '.join(missing)}; pip install 'wastenot[{extra}]', or use adamw"


def refuse_state_of_others(config: OptimizerConfig, saved: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError where the state in checkpoint `path`, of the optimizer `saved`, is of no use to this one."""
    name = saved.get("name", config.name)
    if name != config.name:
        raise ValueError(
            f"optimizer.name: {config.name} cannot go on from the state of {name} in {path}; use {name}, or start from "
            "its weights alone: wastenot convert to-hf and from-hf"
        )
    if name == "adapprox":
        ours, theirs = config.adapprox, saved.get("adapprox", {})
        for option, here in (("momentum", ours.momentum), ("true_error", ours.true_error)):
            # Checkpoints from before there was an option are of its default.
            there = theirs.get(option, False if option == "true_error" else here)
            if there != here:
                here, there = (str(value).lower() if isinstance(value, bool) else value for value in (here, there))
                raise ValueError(
                    f"optimizer.adapprox.{option}: {here} cannot go on from the {there} of {path}; use {there}"
                )
