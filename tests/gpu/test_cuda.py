"""On a CUDA device everything equals the CPU: kernels, a training step, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wastenot.kernels.combine import combine
from wastenot.kernels.cross_entropy import linear_cross_entropy
from wastenot.kernels.dispatch import permute
from wastenot.kernels.gate import gate
from wastenot.kernels.grouped_mm import grouped_swiglu
from wastenot.kernels.route import assign, select
from wastenot.launch.config import DataConfig, LoopConfig, ScheduleConfig, TrainConfig
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.step import Stepper
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import single

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_routing_decisions_are_those_of_the_cpu():
    scores_TE = draw(0, 500, 32).round(decimals=2)
    here = select(scores_TE, 4, 8, 4)
    there = select(scores_TE.cuda(), 4, 8, 4)
    assert there.cpu().equal(here)
    priority_T = scores_TE.amax(-1)
    for capacity in (None, 20):
        slots, counts = assign(here, priority_T, 32, 2, capacity)
        slots_gpu, counts_gpu = (t.cpu() for t in assign(there, priority_T.cuda(), 32, 2, capacity))
        assert counts_gpu.equal(counts)
        if capacity is not None:
            assert slots_gpu.equal(slots)
            continue
        # Who is where in a queue is free then.
        for block, chosen in enumerate(here.chunk(2)):
            for expert in range(32):
                queue = slots_gpu.chunk(2)[block][chosen == expert].sort().values
                assert queue.equal(torch.arange(counts[block, expert])), "slots must be 0, 1, 2 ..."


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "width"), [(1000, 128, 2048), (63, 5, 100)])
def test_logits_of_bf16_tokens_are_exact_to_fp32(tokens, experts, width, dtype, backend):
    x_TD = draw(0, tokens, width).cuda().bfloat16().requires_grad_()
    weight_ED = (0.02 * draw(1, experts, width)).cuda().to(dtype).requires_grad_()
    grad_TE = draw(2, tokens, experts).cuda()
    results = []
    for compute in (lambda: gate(x_TD, weight_ED, backend=backend), lambda: x_TD.double() @ weight_ED.double().t()):
        logits_TE = compute()
        grads = torch.autograd.grad(logits_TE, (x_TD, weight_ED), grad_TE.to(logits_TE.dtype))
        results.append((logits_TE, *grads))
    (logits, grad_x, grad_weight), (exact, exact_x, exact_weight) = results
    assert logits.dtype == torch.float32
    # What rounding the weight to bf16, or to the mantissa of TF32, would miss by far.
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=5e-5)
    torch.testing.assert_close(grad_x, exact_x, rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(grad_weight, exact_weight, rtol=2e-5 if dtype == torch.float32 else 2**-7, atol=2e-3)
    assert logits.equal(gate(x_TD, weight_ED, backend=backend)), "the same product twice"


def test_permute_and_combine_equal_the_cpu():
    position_TK = torch.randperm(200).view(100, 2)
    source_R = torch.empty(200, dtype=torch.int64)
    source_R[position_TK.flatten()] = torch.arange(100).repeat_interleave(2)
    x, weights = draw(0, 100, 48), draw(1, 100, 2)
    rows = permute(x, source_R, position_TK, False)
    y = combine(rows, weights, position_TK, source_R, False)
    gpu = [t.cuda() for t in (x, weights, position_TK, source_R)]
    rows_gpu = permute(gpu[0], gpu[3], gpu[2], False)
    torch.testing.assert_close(rows_gpu.cpu(), rows)
    torch.testing.assert_close(combine(rows_gpu, gpu[1], gpu[2], gpu[3], False).cpu(), y)


def test_grouped_experts_equal_their_reference_in_bf16():
    offsets_e = torch.tensor([10, 10, 64], dtype=torch.int32, device="cuda")
    shapes = [(64, 64), (3, 128, 64), (3, 64, 64)]
    results = []
    for backend in ("torch", "reference"):
        inputs = [(draw(i, *s) / 8).cuda().bfloat16().requires_grad_() for i, s in enumerate(shapes)]
        y = grouped_swiglu(*inputs, offsets_e, backend=backend)
        y.float().square().sum().backward()
        results.append([y, *(t.grad for t in inputs)])
    torch.testing.assert_close(*results, rtol=3e-2, atol=3e-2)


def test_cross_entropy_equals_the_cpu():
    hidden, weight, target = draw(0, 300, 32), draw(1, 500, 32), torch.arange(300)
    here = linear_cross_entropy(hidden, weight, target)
    there = linear_cross_entropy(hidden.cuda(), weight.cuda(), target.cuda())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-4)


def test_a_training_step_equals_the_cpu_and_itself():
    model = ModelConfig(vocab_size=64, d_model=64, layers=2, heads=4, moe=MoEConfig(experts=8, d_expert=64))
    router = RouterConfig(top_k=2, capacity_factor=1.0)
    cpu, gpu = (build_decoder(model, router, single(device), backend="reference") for device in ("cpu", "cuda"))
    gpu.load_state_dict({name: tensor.cuda() for name, tensor in cpu.state_dict().items()})
    tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(0))

    def gradients(decoder: torch.nn.Module, device: str) -> tuple[float, list[torch.Tensor]]:
        inputs, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
        loss = decoder.loss_sum(decoder(inputs).hidden_BSD, targets) / targets.numel()  # pyright: ignore
        return loss.item(), [g.cpu() for g in torch.autograd.grad(loss, list(decoder.parameters()))]

    here, there, again = gradients(cpu, "cpu"), gradients(gpu, "cuda"), gradients(gpu, "cuda")
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    torch.testing.assert_close(there[1], here[1], rtol=1e-2, atol=1e-4)
    assert all(a.equal(b) for a, b in zip(there[1], again[1], strict=True)), "the same step twice"


class Windows:
    def take(self, first: int, count: int) -> np.ndarray:
        return np.random.default_rng(first).integers(0, 64, (count, 17))


@pytest.mark.parametrize("moe", [None, MoEConfig(experts=8, d_expert=64)], ids=["dense", "experts"])
def test_the_trainer_takes_a_step(moe):
    """Also of a dense model, whose account is empty."""
    config = TrainConfig(
        model=ModelConfig(vocab_size=64, d_model=64, layers=2, heads=4, moe=moe),
        schedule=ScheduleConfig(warmup_steps=1),
        data=DataConfig(seq_len=16),
        train=LoopConfig(steps=1, batch=4, precision="bf16"),
    )
    mesh = single("cuda")
    model = build_decoder(config.model, config.router, mesh)
    gradients = Gradients(model, mesh)
    stepper = Stepper(config, mesh, model, make_optimizer(model, config.optimizer), gradients, Windows())  # pyright: ignore[reportArgumentType]
    assert stepper.step(0, 0, stop=False).applied
