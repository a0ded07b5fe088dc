"""Weights that a run begins with (`train.start`): those of another run, and stubs where that has no layer.

A stub is a dense feed-forward network in a layer that compression left with attention alone. Its gate and up matrices
are random and its down matrix is zero: it adds nothing to the residual stream until it has learned, and can learn, as
it could not if all of it were zero.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..moe.config import ModelConfig
from ..moe.decoder import Decoder
from ..moe.feedforward import SwiGLU
from ..parallel.checkpoint import load
from ..parallel.expert import expert_parameter_names
from ..parallel.mesh import Mesh
from ..parallel.training_state import training_state
from .errors import UserError
from .run_folder import RunFolder
from .saved_run import find_checkpoint
from .tokenizer import Tokenizer, load_tokenizer


def load_start(run: str, model: Decoder, mesh: Mesh, tokenizer: Tokenizer) -> Path:
    """Fills `model`, freshly initialised, with the newest weights of `run`, and makes stubs; returns the checkpoint.

    All ranks call it together. Raises UserError where `run` has other tokens, or its weights do not fit.
    """
    folder = RunFolder(run)
    before = folder.load_config().model
    refuse_other_tokenizer(folder, tokenizer, "train.start")
    stubs = new_stubs(before, model.config)
    made = tuple(f"model.blocks.{layer}.{part}" for layer in stubs for part in ("ffn.", "ffn_norm."))
    state = training_state(model, None, mesh, expert_parameter_names(model).__contains__)
    wanted = {name: tensor for name, tensor in state.items() if not name.startswith(made)}
    checkpoint = find_checkpoint(folder, None)
    try:
        load(checkpoint, wanted, mesh, prefix="model.")
    except ValueError as error:
        raise UserError(f"train.start: {error}") from error
    for layer in stubs:
        if layer in model.stages.held:
            _silence(model, layer)
    return checkpoint


def new_stubs(before: ModelConfig, after: ModelConfig) -> list[int]:
    """Numbers of the layers that only attend in `before` and are dense in `after`, which has as many."""
    layers = range(min(before.layers, after.layers))
    return [layer for layer in layers if after.is_dense(layer) and not before.has_ffn(layer)]


def refuse_other_tokenizer(folder: RunFolder, tokenizer: Tokenizer, path: str) -> None:
    """Raises UserError, which names `path` of the configuration, where the run in `folder` has other tokens."""
    if load_tokenizer(folder.tokenizer).fingerprint() != tokenizer.fingerprint():
        raise UserError(
            f"{path}: {folder.path} has another tokenizer than data.corpus was prepared with; prepare its texts with "
            f"data.tokenizer: {folder.tokenizer / 'tokenizer.json'}"
        )


@torch.no_grad()
def _silence(model: Decoder, layer: int) -> None:
    stub = model.blocks.get_submodule(f"{layer}.ffn")
    assert isinstance(stub, SwiGLU)
    stub.down.weight.zero_()
