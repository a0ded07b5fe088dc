"""torchao's AdamW8bit, such that its state goes into a checkpoint and comes back; needs the extra `optimizers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit as TorchaoAdamW8bit


class AdamW8bit(TorchaoAdamW8bit):
    """Two moments as eight-bit codes, with one fp32 scale for each block of 256.

    On a GPU torch.compile fuses the step. On a CPU that would ask for a C++ compiler: the step runs eagerly there.
    """

    def step(self, closure: Any = None) -> Any:
        """One step; all parameters are on one kind of device."""
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)
        with torch.compiler.set_stance("force_eager"):
            return super().step(closure)

    def unwrap(self, parameter: Tensor, key: str, value: Any) -> dict[str, Tensor]:
        """Codes [n, ...] of a moment of `parameter` [n, ...], and scales [n, blocks]; [blocks] where some straddle."""
        del key
        whole = parameter[0].numel() % value.block_size == 0
        return {"codes": value.codes, "scale": value.scale.view(len(parameter), -1) if whole else value.scale}

    def wrap(self, parameter: Tensor, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The moment that `unwrap` gave `parts` of."""
        value = self._subclass_zeros(parameter, key == "exp_avg", self.block_size)
        value.codes.copy_(parts["codes"])
        value.scale.copy_(parts["scale"].view(-1))
        return value
