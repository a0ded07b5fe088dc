"""A run's folder as a model again, whatever layout trained it, and a model as the folder of a run to come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..kernels.backend import implementation
from ..moe.config import EmulateConfig, RouterConfig
from ..moe.decoder import Decoder
from ..parallel.apply import parallelize
from ..parallel.checkpoint import Checkpointer, newest
from ..parallel.expert import expert_parameter_names
from ..parallel.manifest import Manifest, TensorEntry, read_manifest, write_manifest
from ..parallel.mesh import Mesh, single
from ..parallel.training_state import load_training_state, training_state
from .config import TrainConfig
from .env import Rank, pick_device
from .errors import UserError
from .precision import weight_dtype
from .resumed import refuse_deepspeed
from .run_folder import RunFolder
from .settings import as_mapping, dump_config
from .tokenizer import FILE_NAME, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class SavedRun:
    """A trained model with all that it needs to be used."""

    folder: RunFolder
    config: TrainConfig
    """As the run used it, the vocabulary filled in; `kernels: auto` where the run's cannot run here."""
    checkpoint: Path
    step: int
    model: Decoder
    """Whole, in evaluation mode."""
    tokenizer: Tokenizer
    mesh: Mesh


def open_run(path: Path | str, step: int | None = None) -> SavedRun:
    """Loads the checkpoint of `step` (None: the newest complete one) of the run at `path`.

    Weights that it holds in few bits stay so: the model is for evaluation and generation alone.

    Raises UserError where that is no run, it has no such checkpoint, or a part of it is damaged.
    """
    folder = RunFolder(path)
    config = folder.load_config()
    if not (folder.tokenizer / FILE_NAME).is_file():
        raise UserError(f"{folder.path} is not whole: {folder.tokenizer.name}/{FILE_NAME} is missing")
    tokenizer = load_tokenizer(folder.tokenizer)
    config = replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size))
    mesh = single(pick_device(Rank()))
    try:
        implementation(config.kernels, mesh.device)
    except ValueError:
        # They say how to compute, not what: a model that a GPU trained is of use on a laptop.
        config = replace(config, kernels="auto")
    checkpoint = find_checkpoint(folder, step)
    try:
        manifest = read_manifest(checkpoint)
        is_quantized = bool(_quantized(manifest))
        saved = manifest.tensors if is_quantized else {}
        model = blank_decoder(config, mesh, as_trained(config.router, manifest.layout), saved)
        load_training_state(checkpoint, model, None, mesh, expert_parameter_names(model).__contains__)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint of {folder.path}: {error}") from error
    if is_quantized:
        # Here and below: a run of whole weights does not need it.
        from ..moe.compress.quantized import pack_

        pack_(model)
    return SavedRun(folder, config, checkpoint, manifest.step, model.eval(), tokenizer, mesh)


def refuse_quantized(checkpoint: Path, purpose: str) -> None:
    """Raises UserError where `checkpoint` holds weights in few bits, which cannot `purpose`; ValueError where it is
    none."""
    if found := _quantized(read_manifest(checkpoint)):
        raise UserError(
            f"{checkpoint} holds {len(found)} weights in few bits, which cannot {purpose} (among them {found[0]}); use "
            "the checkpoint that they were made from"
        )


def _quantized(manifest: Manifest) -> list[str]:
    """Tensors that are codes of weights (moe/compress/quantize.py)."""
    return sorted(name for name in manifest.tensors if name.startswith("model.") and name.endswith(".q"))


def write_run(
    config: TrainConfig, model: Decoder, tokenizer: Tokenizer, source: str, layout: Mapping[str, int] | None = None
) -> None:
    """Makes `config.log.dir`, new or empty, a run with one checkpoint: of step 0, weights only, made from `source`.

    layout: `Mesh.layout` of the ranks that trained it, whose capacity it has; None: that of `model`. A training run
    that resumes from it starts at step 0 with these weights.
    """
    folder = RunFolder(config.log.dir)
    folder.tokenizer.mkdir(parents=True)
    tokenizer.save(folder.tokenizer)
    checkpoints = Checkpointer(folder.checkpoints, model.mesh, asynchronous=False)
    state = training_state(model, None, model.mesh, expert_parameter_names(model).__contains__)
    checkpoints.save(0, state, {"source": source, "config": as_mapping(config)})
    checkpoints.close()
    written = newest(folder.checkpoints)
    if layout is not None and written is not None:
        write_manifest(written, replace(read_manifest(written), layout=dict(layout)))
    # Last: a folder without it is no run yet.
    folder.config.write_text(dump_config(config), encoding="utf-8")


def blank_decoder(
    config: TrainConfig, mesh: Mesh, router: RouterConfig, quantized: Mapping[str, TensorEntry] | None = None
) -> Decoder:
    """The model of `config` with memory for its weights and nothing in it yet: to be loaded.

    quantized: tensors of a checkpoint, some of whose weights are in few bits; ValueError where they do not fit.
    """
    with torch.device("meta"):
        model = Decoder(config.model, router, mesh, backend=config.kernels)
    if quantized:
        from ..moe.compress.quantized import blank_quantized_

        blank_quantized_(model, {name.removeprefix("model."): entry for name, entry in quantized.items()})
    parallelize(model, mesh, lambda name, tensor, generator: None, 0, weight_dtype(config.train.precision))
    return model


def find_checkpoint(folder: RunFolder, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest complete one; UserError naming those there are where it is missing."""
    refuse_deepspeed(folder.path)
    if step is None:
        found = newest(folder.checkpoints)
        if found is None:
            raise UserError(f"{folder.path} has no complete checkpoint; train until checkpoint.every or to the end")
        return found
    # A step that was saved again has a number behind it: the longest name is the latest.
    named = [path for path in folder.checkpoints.glob("step-*") if path.name.split("-")[1] == f"{step:08d}"]
    if named:
        return max(named, key=lambda path: (len(path.name), path.name))
    steps = sorted({path.name.split("-")[1].lstrip("0") or "0" for path in folder.checkpoints.glob("step-*")}, key=int)
    raise UserError(f"{folder.path} has no checkpoint of step {step}; it has {', '.join(steps) or 'none'}")


def as_trained(router: RouterConfig, layout: Mapping[str, int]) -> RouterConfig:
    """The router that drops in one process what it dropped on the ranks that trained (METHODS R10)."""
    sources = layout.get("world", 1) // layout.get("pipeline", 1)
    if router.capacity_factor is None or router.emulate is not None or sources == 1:
        return router
    return replace(router, jitter=0.0, emulate=EmulateConfig(sources=sources, owners=layout.get("expert", 1)))
