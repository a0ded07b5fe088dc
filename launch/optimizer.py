"""The optimizer that a configuration names, over a model's parameters.

None is written here: AdamW is torch's, or NVIDIA's where it is there (`kernels/fused.py`), Adafactor and Muon are
torch's, CAME and APOLLO their authors', the 8-bit AdamW is torchao's. Weight decay acts on matrices (also stacked
ones), not on norms and biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..kernels.fused import apex_takes, fused_adam, torch_adam
from ..moe.decoder import Decoder
from .errors import UserError
from .optimizer_config import OptimizerConfig, what_is_missing


def make_optimizer(model: Decoder, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names; UserError where its package is not installed."""
    missing = what_is_missing(config.name)
    if missing:
        raise UserError(f"optimizer.name: {missing}")
    return _MAKERS[config.name](model, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups."""
    for group in optimizer.param_groups:
        # Compiled steps read it from a tensor, which must stay the same one.
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class _Maker(Protocol):
    def __call__(self, model: Decoder, config: OptimizerConfig, /) -> torch.optim.Optimizer: ...


def _adamw(model: Decoder, config: OptimizerConfig) -> torch.optim.Optimizer:
    return _fused_adamw(_trained(model), config)


def _adafactor(model: Decoder, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Stacked experts [E, m, n] as E matrices, but clipped and scaled as one parameter: this rank's experts."""
    return torch.optim.Adafactor(_groups(_trained(model), config), lr=config.lr)


def _came(model: Decoder, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Stacked experts as E matrices, but clipped as one parameter. The third beta and the epsilons are its own."""
    from came_pytorch.CAME import CAME

    return CAME(_groups(_trained(model), config), lr=config.lr, betas=(config.beta1, config.beta2, 0.9999))


def _adamw8bit(model: Decoder, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Moments of parameters of 4096 numbers or more in blocks of 256 eight-bit codes."""
    from .adamw8bit import AdamW8bit

    betas = (config.beta1, config.beta2)
    return AdamW8bit(_groups(_trained(model), config), lr=config.lr, betas=betas, eps=config.eps)


def _muon(model: Decoder, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon for hidden matrices, AdamW for the rest: embedding, output layer, vectors, and stacked experts.

    torch's Muon refuses stacks, so in a mixture of experts most weights are AdamW's. Muon keeps its own momentum
    (0.95) and scales its steps to the size of AdamW's, so that one learning rate suits both.
    """
    hidden, rest = _hidden_matrices(model)
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        decay = config.weight_decay
        parts.append(torch.optim.Muon(hidden, lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(_fused_adamw(rest, config))
    return InTurn(*parts)


def _apollo(model: Decoder, config: OptimizerConfig) -> torch.optim.Optimizer:
    """APOLLO for hidden matrices; its plain AdamW for embedding, output layer, vectors, and stacked experts.

    It projects matrices only, so in a mixture of experts most weights keep two full moments.
    """
    from .apollo import Apollo

    hidden, rest = _hidden_matrices(model)
    by_side: dict[int, list[nn.Parameter]] = {}
    for p in hidden:
        by_side.setdefault(min(p.shape), []).append(p)
    # Channel-wise scaling of random projections: what the paper calls APOLLO, with its package's own defaults.
    fixed = {"proj": "random", "scale_type": "channel", "scale": 1.0, "proj_type": "std"}
    projected: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay,
            "rank": max(1, int(config.apollo.rank * side)),
            "update_proj_gap": config.apollo.refresh_every,
            **fixed,
        }
        for side, parameters in by_side.items()
    ]
    betas = (config.beta1, config.beta2)
    return Apollo([*projected, *_groups(rest, config)], lr=config.lr, betas=betas, eps=config.eps)


def _adapprox(model: Decoder, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Everything by Adapprox, each stacked expert as a matrix with a rank of its own."""
    from ..parallel.optim import Adapprox

    names = {p: name for name, p in model.named_parameters()}
    groups = _groups(_trained(model), config)
    return Adapprox(
        [{**group, "params": [(names[p], p) for p in group["params"]]} for group in groups],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        # Its section has the names of the optimizer's own options.
        **asdict(config.adapprox),
        expert_group=model.mesh.expert.group,
        backend=model.backend,
    )


_MAKERS: Mapping[str, _Maker] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "adamw8bit": _adamw8bit,
    "adapprox": _adapprox,
    "apollo": _apollo,
    "came": _came,
    "muon": _muon,
}


class InTurn(torch.optim.Optimizer):
    """Optimizers over disjoint parameters as one: their groups in a row, one state, each steps in turn."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the parts go on with what was loaded."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Makes state and groups of the whole those of its parts."""
        first = 0
        for part in self.parts:
            part.state = self.state
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            first += len(part.param_groups)

    def step(self, closure: Any = None) -> Any:
        """Steps every part; a closure is called once, before the first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def _fused_adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    parameters = list(parameters)
    groups = [part for group in _groups(parameters, config) for part in _by_mesh(group)]
    adam = fused_adam(parameters[0].device).run if parameters and apex_takes(parameters) else torch_adam
    return adam(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """`group` as one for plain tensors and one for DTensors of each mesh: one fused kernel takes no two kinds."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for p in group["params"]:
        kinds.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return [group | {"params": params} for params in kinds.values()]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _hidden_matrices(model: Decoder) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices between embedding and output layer; all other parameters, stacks of matrices among them."""
    outer = ("embedding.weight", "head.weight")
    hidden = [p for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2 and name not in outer]
    taken = set(hidden)
    return hidden, [p for p in _trained(model) if p not in taken]


def _groups(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """With weight decay and without; where only a part of a model learns, there may be none of a kind."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
