"""A gate and experts of one's own on two expert-parallel ranks: what one process computes that emulates them."""

from __future__ import annotations

import torch
from spawned import run_ranks
from torch import Tensor

from wastenot.moe.config import EmulateConfig, RectifyConfig, RouterConfig
from wastenot.moe.ledger import count_slots
from wastenot.moe.mixture import mixture
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import local_experts
from wastenot.parallel.mesh import make_mesh, single

T, D, E = 40, 6, 4
ROUTER = RouterConfig(
    top_k=2,
    capacity_factor=0.7,
    rectify=RectifyConfig(intra=True, fill=True),
    emulate=EmulateConfig(sources=2, owners=2),
)


def compute(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, gradients of this rank's tokens and gate logits, its slots, and the gradients of its experts."""
    mesh = single() if world == 1 else make_mesh(ParallelConfig(expert=world), "cpu")
    generator = torch.Generator().manual_seed(0)
    x_TD, logits_TE, matrices_EDD = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((T, D), (T, E), (E, D, D))
    )
    held = local_experts(E, mesh.expert)
    matrices_eDD = matrices_EDD[held.start : held.stop].clone().requires_grad_()
    x_TD, logits_TE = (t.chunk(world)[rank].clone().requires_grad_() for t in (x_TD, logits_TE))

    def experts(rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        parts = rows_RD.tensor_split(offsets_e[:-1].tolist())
        return torch.cat([(rows @ matrix).tanh() for rows, matrix in zip(parts, matrices_eDD, strict=True)])

    y_TD, routing = mixture(x_TD, logits_TE, experts, ROUTER, mesh)
    y_TD.square().sum().backward()
    assert x_TD.grad is not None and logits_TE.grad is not None and matrices_eDD.grad is not None
    return y_TD.detach(), x_TD.grad, logits_TE.grad, count_slots(routing), matrices_eDD.grad


def test_two_ranks_compute_what_one_process_emulates():
    alone = compute(0, 1)
    y, x_grad, logits_grad, slots, matrices_grad = zip(*run_ranks(2, compute), strict=True)
    torch.testing.assert_close(torch.cat(y), alone[0])
    torch.testing.assert_close(torch.cat(x_grad), alone[1])
    torch.testing.assert_close(torch.cat(logits_grad), alone[2])
    assert torch.equal(sum(slots), alone[3])  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(matrices_grad), alone[4])
