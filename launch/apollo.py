"""APOLLO from its authors' package, such that a resumed run goes on as if uninterrupted; needs the extra `apollo`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apollo_torch import APOLLOAdamW
from apollo_torch.random_projector import next_seed
from torch import Tensor


class Apollo(APOLLOAdamW):
    """APOLLO for groups with a `rank`, AdamW for others (arXiv 2412.05270).

    Projections follow from a parameter's seed and the number of those before: they are drawn again, not saved.
    """

    def _initialize_projector(self, group: dict[str, Any], state: dict[str, Any]) -> Any:
        projector = super()._initialize_projector(group, state)
        for _ in range(state["step"] // group["update_proj_gap"]):
            projector.seed = next_seed(projector.seed)
        if "scaled_grad" in state:
            # Scalars are loaded to the host, where dividing by one rounds otherwise.
            state["scaled_grad"] = state["scaled_grad"].to(group["params"][0].device)
        return projector

    def unwrap(self, parameter: Tensor, key: str, value: object) -> dict[str, Tensor]:
        """Nothing of the projector `value`."""
        del parameter, value
        assert key == "projector"
        return {}

    def wrap(self, parameter: Tensor, key: str, parts: Mapping[str, Tensor]) -> object:
        """Never called: `unwrap` leaves no parts."""
        raise AssertionError(f"{key} of {list(parameter.shape)} from {', '.join(parts)}")
