"""What a configuration says of the engine that trains. Torch-free.

`native` is wastenot's own runtime. The others hand the model, or the whole training step, to an engine that people
run already: `engines/deepspeed.py`, `engines/megatron.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

EngineName = Literal["native", "deepspeed", "megatron"]

_MODULES = {"deepspeed": "deepspeed", "megatron": "megatron.core"}


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """Only read where `engine` is deepspeed."""

    zero: int = 0
    """ZeRO stage: 1 shares the optimizer's state out among data-parallel ranks, 2 gradients too, 3 weights too."""
    json: str | None = None
    """A DeepSpeed JSON file whose entries go over the generated ones, which follow from everything else here."""

    def __post_init__(self) -> None:
        if not 0 <= self.zero <= 3:
            raise ValueError(f"zero: {self.zero} is no stage of ZeRO; use {0 if self.zero < 0 else 3}")


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """Only read where `engine` is megatron."""

    layer: Literal["megatron", "wastenot"] = "megatron"
    """Whose MoE layer: Megatron's dispatcher and experts behind our router, or our layer as a whole."""


def what_is_missing(engine: EngineName) -> str:
    """What to install for `engine`, or nothing; imports none of it."""
    module = _MODULES.get(engine)
    if module is None or _is_there(module):
        return ""
    return f"{engine} is not installed; pip install 'wastenot[{engine}]', or use engine: native"


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        # Of a package within one that is not there, or is another's.
        return False
