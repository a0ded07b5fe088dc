"""What a compression did to a model: predictions of held-out text, size, speed, balance; stage by stage.

The rows are what `compress report` draws; `unigram_accuracy` is what the commonest token alone gets right, so that
quality kept is (accuracy - unigram) / (accuracy of the whole - unigram).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...launch.saved_run import open_run
from ...launch.streamed import open_streamed
from ...moe.compress.calibration import Calibration
from ...moe.compress.evaluate import Evaluator, Quality
from ...moe.compress.fingerprint import is_run
from ...moe.compress.forward import run_layers
from ...moe.compress.placement import imbalance
from ...moe.compress.plan import DropPlan
from ...moe.compress.profile import Profile
from .speed import Speed, compare, of_decoder
from .verify import dropless_logits

Row = dict[str, Any]


def unigram_accuracy(seen_T: Tensor, text: Calibration) -> float:
    """Part of the tokens of `text` with one before them that are the commonest of `seen_T` (token ids [T])."""
    commonest = seen_T.bincount().argmax()
    targets_T = text.tokens_NS[:, 1:][text.mask_NS[:, 1:]]
    return float((targets_T == commonest).double().mean())


def kept(accuracy: float, whole: float, unigram: float) -> float | None:
    """Quality kept, 0 to 1 (and more, where a model became better); None of a model that had none."""
    return (accuracy - unigram) / (whole - unigram) if whole > unigram else None


def judged(checkpoint: Path, judge: Evaluator) -> Quality:
    """Of a checkpoint of any kind beside the model that `judge` has, on its text."""
    if is_run(checkpoint):
        model = open_run(checkpoint).model
        # Whatever capacity it trains with: profiles are dropless, and so is what serves it.
        return judge.quality_of(lambda at: dropless_logits(model, judge.text.tokens_NS[at]))
    streamed = open_streamed(checkpoint)
    # All at once: each layer is read once.
    h_NSD = run_layers(streamed, judge.text.tokens_NS, batch=judge.batch)
    return judge.quality_of(lambda at: streamed.logits(h_NSD[at]))


def row(name: str, checkpoint: Path, quality: Quality, speed: Speed | None) -> Row:
    """One line of quality.json."""
    parameters, size = stored(checkpoint)
    return {
        "name": name,
        "checkpoint": str(checkpoint),
        "parameters": parameters,
        "bytes": size,
        "loss": quality.loss,
        "accuracy": quality.accuracy,
        "kl": quality.kl,
        "prefill_tokens_per_second": None if speed is None else speed.prefill,
        "decode_tokens_per_second": None if speed is None else speed.decode,
    }


def stored(checkpoint: Path) -> tuple[int, int]:
    """Parameters and bytes of a checkpoint's weights, without the state of an optimizer.

    A weight in few bits counts as the parameters it stands for, and the bytes of codes and scales.
    """
    if is_run(checkpoint):
        from ...moe.compress.fingerprint import newest_checkpoint
        from ...parallel.manifest import read_manifest

        entries = read_manifest(newest_checkpoint(checkpoint)).tensors
        weights = {
            name: (entry.shape, entry.dtype.itemsize) for name, entry in entries.items() if name.startswith("model.")
        }
        is_packed = {name: entries[name].dtype == torch.uint8 for name in weights}
    else:
        from ...moe.compress.stored import read_stock

        tensors = read_stock(checkpoint).tensors
        weights = {}
        for name, tensor in tensors.items():
            numel = max(1, torch.Size(tensor.shape).numel())
            weights[name] = tensor.shape, tensor.length // numel
        is_packed = {name: tensor.dtype == "U8" for name, tensor in tensors.items()}
    parameters = size = 0
    for name, (shape, itemsize) in weights.items():
        numel = torch.Size(shape).numel()
        size += numel * itemsize
        if not name.endswith((".scale", ".bias_E")):
            # Codes of 4 bits lie two in a byte.
            parameters += numel * (2 if name.endswith(".q") and is_packed[name] else 1)
    return parameters, size


def speeds(checkpoints: dict[str, Path], prompt: int = 128) -> dict[str, Speed]:
    """Of runs, side by side in one process."""
    models = {name: open_run(path).model for name, path in checkpoints.items()}
    return compare({name: of_decoder(model, prompt) for name, model in models.items()}, prompt)


def balance(plan: DropPlan, before: Profile, after: Profile, ranks: int) -> list[dict[str, Any]]:
    """Of each layer left: load of the busiest of `ranks` over the mean, before anything went and as `plan` leaves it.

    `after`: a profile of the model under `plan`, whose experts are in the order they are stored.
    """
    rows = []
    for layer in plan.survivors:
        was, now = (profile.layers[layer].get("routed_E") for profile in (before, after))
        if was is None or now is None or len(was) % ranks or len(now) % ranks:
            continue
        rows.append({"layer": layer, "before": busiest(was.tolist(), ranks), "after": busiest(now.tolist(), ranks)})
    return rows


def kept_units(plan: DropPlan) -> set[tuple[int, int]]:
    """What `plan` keeps of what can go: (layer, expert), and (layer, -1) for a block."""
    blocks = {(layer, -1) for layer in plan.survivors}
    return blocks | {(layer, expert) for layer in plan.survivors for expert in plan.kept(layer)}


def busiest(load: Sequence[float], ranks: int) -> float:
    """Load of the busiest of `ranks` equal consecutive shares, over the mean."""
    return imbalance(load, range(len(load)), ranks)
