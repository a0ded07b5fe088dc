"""Weights in few bits as stock transformers reads them: the `pack-quantized` layout of compressed-tensors.

transformers 5.23 with compressed-tensors 0.20, measured on tiny models of all families on a CPU: logits are those of
the weights that the codes stand for, and no tensor is missing or left over. It forms whole weights as it loads
(experts) or first computes (linear layers): the files are small, the model in memory is not. torchao 0.18 is no
alternative there: its 4-bit layouts refuse a CPU, and of models with experts in one tensor it leaves these as they are.

vLLM reads the layout too; not run.

Only names and packing change: 8 or 4 codes in an int32, the first in the lowest bits, each moved up to be positive.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .fingerprint import stock_fingerprint
from .partial import Partial, check_target
from .places import Place, places_of
from .quantize import codes_of
from .shapes import shape_of_config
from .stored import BASE_CONFIG, COMPRESSED, CONFIG, INDEX, WEIGHTS, StockFolder, read_stock

__all__ = ["export_quantized", "is_quantized", "packed_tensors", "quantization_config"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_OURS = (BASE_CONFIG, COMPRESSED, INDEX)


def is_quantized(folder: Path | str) -> bool:
    """Whether the Hugging Face folder, stock or compressed, holds weights as `apply` writes them in few bits."""
    return any(name.endswith(".q") for name in read_stock(folder).tensors)


def export_quantized(
    source: Path | str, target: Path | str, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Writes the compressed folder `source`, whose plan only quantized, as a folder that stock loaders read.

    progress: hears (files done, files in all). Memory holds one file.
    Raises ValueError where `source` is not in few bits, has not the layers and experts of its configuration (cut and
    export first, then quantize what was exported), or `target` exists; OSError where it cannot be written.
    """
    target = Path(target)
    check_target(target)
    stock = read_stock(source)
    codes = {name.removesuffix(".q") for name in stock.tensors if name.endswith(".q")}
    if not codes:
        raise ValueError(f"{source}: holds no weights in few bits; apply a plan with `quantize` first")
    if stock.shape != shape_of_config(stock.config):
        raise ValueError(
            f"{source}: has other layers or experts than {BASE_CONFIG} says; export what is cut, then quantize that"
        )
    places = places_of(_whole(stock.tensors), stock.family, stock.shape.layers)
    dtype = _DTYPES[stock.tensors["model.norm.weight"].dtype]
    by_file: dict[Path, list[str]] = {}
    for name in _whole(stock.tensors):
        by_file.setdefault(stock.tensors[f"{name}.q" if name in codes else name].file, []).append(name)
    partial = Partial(target, {"source": stock_fingerprint(stock), "layout": "pack-quantized"})
    for number, (file, names) in enumerate(by_file.items()):
        if file.name not in partial.finished:
            partial.write(file.name, lambda path, file=file, names=names: _write(path, file, names, codes, dtype))
        progress(number + 1, len(by_file))
    held = {name: file for file, note in partial.finished.items() for name in note["names"]}
    if set(held.values()) != {WEIGHTS}:
        total = sum(note["bytes"] for note in partial.finished.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(held.items()))}
        partial.add(INDEX, json.dumps(index, indent=2) + "\n")
    config = {**stock.config, "quantization_config": quantization_config(*_bits(stock, min(codes)), _ignored(places))}
    partial.add(CONFIG, json.dumps(config, indent=2) + "\n")
    for path in sorted(stock.path.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _OURS:
            partial.copy(path, path.name)
    partial.complete()


def packed_tensors(name: str, q: Tensor, scale: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What stands for the weight `name` [O, I] in this layout. `dtype`: of the model; transformers gives it to experts.

    Raises ValueError where the inputs do not fill whole int32.
    """
    codes, bits = codes_of(q), 4 if q.dtype == torch.uint8 else 8
    in_one = 32 // bits
    if codes.size(-1) % in_one:
        raise ValueError(f"{name}: {codes.size(-1)} inputs fill no whole int32 of {in_one} codes; leave it in bf16")
    moved = (codes.long() + (1 << bits - 1)).unflatten(-1, (-1, in_one))
    word = (moved << torch.arange(in_one, device=q.device) * bits).sum(-1)
    return {
        f"{name}_packed": torch.where(word >= 1 << 31, word - (1 << 32), word).int(),
        f"{name}_scale": scale.to(dtype),
        f"{name}_shape": torch.tensor(codes.shape),
    }


def quantization_config(bits: int, group: int, ignore: Iterable[str]) -> dict[str, Any]:
    """What config.json says of it. group: 0 for one scale a row; ignore: modules that are whole."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(ignore),
    }


def _whole(names: Iterable[str]) -> list[str]:
    """Names of the weights that tensors stand for."""
    return list(dict.fromkeys(name.removesuffix(".q").removesuffix(".scale") for name in names))


def _bits(stock: StockFolder, name: str) -> tuple[int, int]:
    q, scale = stock.tensors[f"{name}.q"], stock.tensors[f"{name}.scale"]
    return (8, 0) if q.dtype == "I8" else (4, 2 * q.shape[-1] // scale.shape[-1])


def _ignored(places: Mapping[str, Place]) -> list[str]:
    """Modules that would be linear layers to a loader, and are whole: routers, gates, the output layer."""
    whole = [
        name for name, place in places.items() if place.part in ("router", "next_n") or place.weight == "shared_gate"
    ]
    return ["lm_head", *sorted(name.removesuffix(".weight") for name in whole if name.endswith(".weight"))]


def _write(path: Path, source: Path, names: list[str], codes: set[str], dtype: torch.dtype) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as file:
        for name in names:
            if name in codes:
                q, scale = file.get_tensor(f"{name}.q"), file.get_tensor(f"{name}.scale")
                tensors |= packed_tensors(name, q, scale, dtype)
            else:
                tensors[name] = file.get_tensor(name)
    save_file(tensors, path, {"format": "pt"})
    return {"names": list(tensors), "bytes": sum(each.numel() * each.element_size() for each in tensors.values())}
