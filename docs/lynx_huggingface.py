"""Recomputation under all-reduces, in a Llama of transformers that two ranks share:

    torchrun --nproc-per-node 2 docs/lynx_huggingface.py

Attention and MLP are cut as Megatron-LM cuts them (arXiv 1909.08053, section 3): heads and hidden units over the ranks,
an all-reduce after each in forward, and one before each in backward. While a layer waits for one of the latter, the
same part of the layer below is computed again. The model is transformers' own: parts get another `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from wastenot.launch.peak_memory import peak_bytes
from wastenot.parallel.recomputation import Recomputation, Schedule
from wastenot.parallel.windowed import sum_gradients, sum_terms

CUT = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}
"""Matrices that ranks share, and which side of each is cut."""

PARTS = {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}
"""Of a layer: what normalises its input, and what ranks compute together."""


def cut_(model: nn.Module) -> None:
    """Leaves this rank its part of the matrices that ranks share."""
    for name, module in model.named_modules():
        dim = CUT.get(name.rpartition(".")[2])
        if dim is not None:
            part = module.weight.detach().chunk(dist.get_world_size(), dim)[dist.get_rank()]
            module.weight = nn.Parameter(part.clone())


def over_ranks(recomputation: Recomputation, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` for a part of a layer: `stock` of this rank's heads or hidden units, summed over the ranks."""

    def forward(hidden_states: Tensor, **others: Any) -> Any:
        x = sum_gradients(hidden_states, during=recomputation.window(f"{name} gradient"))
        term = recomputation.segment(name, partial(stock, **others), x)
        # Attention returns its weights too, or None in their place.
        return (sum_terms(term[0]), *term[1:]) if isinstance(term, tuple) else sum_terms(term)

    return forward


def attach_(model: LlamaForCausalLM, recomputation: Recomputation) -> None:
    """Makes segments of the parts of all layers, and gives the all-reduces of their gradients a window."""
    model.register_forward_pre_hook(lambda module, _: recomputation.begin(module))
    for i, layer in enumerate(model.model.layers):
        for name, (norm, part) in PARTS.items():
            norm, part = getattr(layer, norm), getattr(layer, part)
            norm.forward = partial(recomputation.segment, f"{i}.{name} norm", norm.forward)
            part.forward = over_ranks(recomputation, f"{i}.{name}", part.forward)


def in_windows_above(layers: int) -> Schedule:
    """Drops all layers but the last; each part is computed again in the window of the same part one layer above."""
    windows = {
        f"{i + 1}.{name} gradient": (f"{i}.{name} norm", f"{i}.{name}") for i in range(layers - 1) for name in PARTS
    }
    return Schedule(dropped=frozenset(name for names in windows.values() for name in names), windows=windows)


def gradients(model: nn.Module, tokens_BS: Tensor) -> dict[str, Tensor]:
    """Of the mean loss, by name of the parameter."""
    model.zero_grad()
    model(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def tiny() -> LlamaForCausalLM:
    """The same random model on all ranks, whole."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """One step with everything kept, one with the schedule; a line from each rank."""
    dist.init_process_group("gloo")
    model, recomputation = tiny(), Recomputation()
    cut_(model)
    attach_(model, recomputation)
    tokens_BS = torch.randint(64, (4, 128), generator=torch.Generator().manual_seed(1))

    kept = gradients(model, tokens_BS)
    kept_mib = peak_bytes(lambda: gradients(model, tokens_BS)) / 2**20
    recomputation.schedule = in_windows_above(model.config.num_hidden_layers)
    again = gradients(model, tokens_BS)
    hidden_s, exposed_s = recomputation.spent.take()
    again_mib = peak_bytes(lambda: gradients(model, tokens_BS)) / 2**20

    equal = all(again[name].equal(gradient) for name, gradient in kept.items())
    print(
        f"rank {dist.get_rank()}: gradients equal: {equal}; most memory at once: {again_mib:.1f} MiB, "
        f"with everything kept {kept_mib:.1f}; recomputed under all-reduces: "
        f"{hidden_s / (hidden_s + exposed_s):.0%} of {(hidden_s + exposed_s) * 1e3:.1f} ms",
        flush=True,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
