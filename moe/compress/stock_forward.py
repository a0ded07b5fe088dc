"""A script of its own: loads a folder with stock transformers, 4 or 5, and writes what the model computes.

`verify` starts it, with any Python that has torch and transformers, so that nothing of this process (patches, remote
code, the network) helps a model along. It imports nothing of ours.

Reads a JSON list of orders from standard input, and prints one of answers. An order has `folder`; `logits`, the
safetensors file to write; `tokens`, a list of lists; `generate`, how many tokens to add with a cache; and what to
bypass: `blocks` and `feeds` (lists of layers), `experts` and `silent` (layer -> experts).
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Reads the orders, computes, answers."""
    print(json.dumps([answered(order) for order in json.load(sys.stdin)]))


def answered(order: dict[str, Any]) -> dict[str, Any]:
    """What transformers said while it loaded the folder of `order`; only `error` where it did not."""
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            order["folder"],
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        # Whatever it is, it is what a user of the folder would meet.
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    model, loading = loaded
    answer: dict[str, Any] = {
        "transformers": transformers.__version__,
        "missing": _names(loading["missing_keys"]),
        "unexpected": _names(loading["unexpected_keys"]),
        "mismatched": _names(loading["mismatched_keys"]),
        "errors": _names(loading["error_msgs"]),
        "not_finite": [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()],
    }
    _bypass(model.eval(), order)
    tokens_BS = torch.tensor(order["tokens"])
    with torch.no_grad():
        logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits
        if order["generate"]:
            answer["generates"] = _generates(model, tokens_BS, order["generate"])
    save_file({"logits": logits_BSV.contiguous()}, order["logits"])
    return answer


def _generates(model: Any, tokens_BS: Any, count: int) -> bool:
    """Whether `count` tokens that are added with a cache are those without one."""
    import torch

    how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    mask_BS = torch.ones_like(tokens_BS)
    kept, fresh = (
        model.generate(tokens_BS, attention_mask=mask_BS, use_cache=use_cache, **how) for use_cache in (True, False)
    )
    return bool(kept.equal(fresh))


def _names(values: Any) -> list[str]:
    return sorted(str(value) for value in values)


def _bypass(model: Any, order: dict[str, Any]) -> None:
    """Hooks that make `model` what a plan leaves of it, without touching how it is put together."""
    import torch
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode

    class Masked(TorchFunctionMode):
        """Logits of `gone` experts are -inf, wherever the router computes them."""

        def __init__(self, gone: Any) -> None:
            super().__init__()
            self.gone = gone

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return out.index_fill(-1, self.gone, float("-inf")) if func is F.linear else out

    def masked(forward: Any, gone: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with Masked(gone):
                return forward(*args, **kwargs)

        return call

    layers = model.model.layers
    for layer in order["blocks"]:
        layers[layer].register_forward_hook(lambda module, args, out: _like(out, args[0]))
    for layer in order["feeds"]:
        layers[layer].mlp.register_forward_hook(lambda module, args, out: _like(out, torch.zeros_like(args[0])))
    for layer, experts in order["experts"].items():
        gate, gone = layers[int(layer)].mlp.gate, torch.tensor(experts)
        gate.forward = masked(gate.forward, gone)
        if hasattr(gate, "e_score_correction_bias"):
            # A score of 0 plus a bias could still win.
            gate.e_score_correction_bias[gone] = float("-inf")
    for layer, experts in order["silent"].items():
        layers[int(layer)].mlp.experts.down_proj.data[torch.tensor(experts)] = 0


def _like(out: Any, value: Any) -> Any:
    return (value, *out[1:]) if isinstance(out, tuple) else value


if __name__ == "__main__":
    main()
