"""Auxiliary losses of the router, and the selection bias that replaces them (METHODS R8).

Every loss is this rank's part of a sum over ranks: gradients are summed, so nothing is scaled by the world size
later. All read `Routing` values; recomputation and accumulation cannot count them twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..parallel.collectives import all_reduce
from ..parallel.mesh import Mesh
from .config import RouterConfig
from .router import TopKRouter
from .routing import Routing, count_of


def load_balance(routing: Routing, over: str, mesh: Mesh, sequences: int) -> Tensor:
    """Switch load-balancing loss, E * sum_e f_e P_e, on first choices before dropping (R8).

    f_e is the part of tokens whose first choice is e, P_e the mean router probability of e; both over a block
    (mean over this rank's blocks), a sequence (mean over `sequences`, of which tensor ranks hold parts), or all ranks'
    tokens (`global`: this rank's term of the one sum). Returns the part of this rank of the mean over ranks.
    """
    T, E = routing.probs_TE.shape
    first_T = routing.experts_TK[:, 0]
    if over == "global":
        part_E = count_of(first_T, E).to(routing.probs_TE.dtype)
        part_E = all_reduce(part_E, mesh.stage, "balance-counts", mesh.recorder) / (T * mesh.stage.size)
        return E * (part_E * routing.probs_TE.mean(0)).sum() / mesh.stage.size
    groups = routing.num_blocks if over == "block" else sequences
    group_T = torch.arange(T, device=first_T.device) // (T // groups)
    counts_gE = count_of(group_T * E + first_T, groups * E).view(groups, E)
    part_gE = counts_gE.to(routing.probs_TE.dtype) / (T // groups)
    if over == "sequence" and mesh.tensor.size > 1:
        part_gE = all_reduce(part_gE, mesh.tensor, "balance-counts", mesh.recorder) / mesh.tensor.size
    mean_gE = routing.probs_TE.view(groups, T // groups, E).mean(1)
    return E * (part_gE * mean_gE).sum() / (groups * mesh.stage.size)


def z_loss(routing: Routing, mesh: Mesh) -> Tensor:
    """Mean of logsumexp(logits)^2 over all ranks' tokens: this rank's part of it."""
    return routing.logits_TE.logsumexp(-1).square().mean() / mesh.stage.size


def auxiliary_loss(
    routings: Sequence[Routing], config: RouterConfig, mesh: Mesh, sequences: int, layers: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over layers of all configured router losses, and the unweighted mean of each for the log.

    layers: over which those are means, where `routings` are of some of them only: of their parts, the sum over ranks.
    """
    device = mesh.device
    total = torch.zeros((), device=device)
    shown: dict[str, Tensor] = {}
    layers = len(routings) if layers is None else layers
    if not layers or config.kind != "learned":
        return total, shown
    if config.balance_loss > 0:
        balance = _stacked([load_balance(r, config.balance_over, mesh, sequences) for r in routings], device)
        total = total + config.balance_loss * balance.sum()
        shown["balance_loss"] = balance.detach().sum() / layers
    if config.z_loss > 0:
        z = _stacked([z_loss(r, mesh) for r in routings], device)
        total = total + config.z_loss * z.sum()
        shown["z_loss"] = z.detach().sum() / layers
    return total, shown


def _stacked(losses: list[Tensor], device: torch.device) -> Tensor:
    return torch.stack(losses) if losses else torch.zeros(0, device=device)


@torch.no_grad()
def update_bias(router: TopKRouter, load_E: Tensor) -> None:
    """Moves the selection bias toward underused experts by a fixed step (auxiliary-loss-free balancing).

    `load_E` counts choices over all ranks and micro-batches of the step (arXiv 2408.15664, sign form).
    """
    load = load_E.to(torch.float32)
    router.bias_E += router.config.bias_update * (load.mean() - load).sign()
