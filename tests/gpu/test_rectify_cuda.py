"""On a CUDA device rectified mixtures equal the CPU's, in one's own module and in transformers, and never wait."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from wastenot.moe.config import EmulateConfig, ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.moe.mixture import mixture
from wastenot.parallel.mesh import single

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BOTH = RectifyConfig(intra=True, fill=True)


def test_a_mixture_of_ones_own_equals_the_cpu():
    config = RouterConfig(top_k=2, capacity_factor=0.7, rectify=BOTH, emulate=EmulateConfig(sources=4, owners=4))
    x_TD, logits_TE, matrices_EDD = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed, shape in enumerate(((64, 16), (64, 8), (8, 16, 16)))
    )

    def compute(device: str) -> tuple[Tensor, ...]:
        inputs = [t.to(device).requires_grad_() for t in (x_TD, logits_TE, matrices_EDD)]

        def experts(rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
            parts = rows_RD.tensor_split(offsets_e[:-1].tolist())
            return torch.cat([(rows @ matrix).tanh() for rows, matrix in zip(parts, inputs[2], strict=True)])

        y_TD, routing = mixture(inputs[0], inputs[1], experts, config)
        y_TD.square().sum().backward()
        return tuple(t.cpu() for t in (y_TD.detach(), routing.slots_TK, *(t.grad for t in inputs)))

    torch.testing.assert_close(compute("cuda"), compute("cpu"))


def test_a_rectified_mixtral_equals_the_cpu():
    transformers: Any = pytest.importorskip("transformers")
    from wastenot.moe.adapters.huggingface_rectify import rectify_

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_implementation="eager",
    )
    cpu = transformers.MixtralForCausalLM(config).double().train()
    rectify_(cpu, capacity_factor=0.7, ranks=4)
    gpu = copy.deepcopy(cpu).cuda()
    tokens_BS = torch.randint(0, 64, (4, 16))
    loss = cpu(input_ids=tokens_BS, labels=tokens_BS).loss
    loss.backward()
    loss_gpu = gpu(input_ids=tokens_BS.cuda(), labels=tokens_BS.cuda()).loss
    loss_gpu.backward()
    torch.testing.assert_close(loss_gpu.cpu(), loss)
    for (name, here), there in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(there.grad.cpu(), here.grad, msg=name)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="before Hopper torch's grouped products read their offsets on the host",
)
def test_a_padded_layer_with_bounded_stand_ins_never_waits_for_the_device():
    """As in tests/papers without values; here CUDA itself raises at a wait."""
    config = RouterConfig(capacity_factor=0.5, rectify=RectifyConfig(intra=True, fill=True, capacity=0.25))
    moe = MoEConfig(experts=8, d_expert=64, shared_experts=1, dispatch="padded")
    model = build_decoder(ModelConfig(vocab_size=16, d_model=64, layers=1, moe=moe), config, single("cuda"))
    layer = model.blocks[0].ffn
    x_BSD = torch.randn(4, 32, 64, device="cuda", requires_grad=True)

    def forward_and_backward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y_BSD, _ = layer(x_BSD)  # pyright: ignore[reportCallIssue]
        torch.autograd.grad(y_BSD.sum(), [x_BSD, *layer.parameters()])

    forward_and_backward()  # handles and workspaces are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
