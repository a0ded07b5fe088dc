"""What every layer does to a calibration text, in one pass over a checkpoint, layer by layer (METHODS C1-C3, C5).

Only one layer's weights are in memory, and the residual stream of all calibration tokens at the last `window` layer
boundaries; ranks share both (tokens over all ranks, experts over the expert axis). The folder it leaves

    profile.json          what was profiled on what; `Profile.fingerprint` names it
    layer-0007.safetensors    the sums of layer 7 (statistics.py)
    costs.json            seconds and bytes, predicted and measured; of no consequence for any decision

is the same, byte for byte, whether or not the process was killed on the way and continued.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...parallel.mesh import Mesh, single
from .calibration import Calibration
from .forward import moe_output, read_planned
from .plan import DropPlan, Shape, fingerprint, shape_from
from .residency import peak_of
from .statistics import LayerSums
from .streamed import StreamedLayer, StreamedModel

__all__ = ["Profile", "ProfileConfig", "measure", "predicted_bytes", "profile", "read_profile"]

VERSION = 1
FILE, COSTS = "profile.json", "costs.json"


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """How a profile is taken."""

    window: int = 1
    """Block Drop's longest window: this many boundaries of the residual stream are kept."""
    hessians: bool = False
    """Also sums of x x^T for each expert, for SparseGPT: D^2 + F^2 numbers an expert."""
    batch: int = 4
    """Windows of text that a rank computes at a time."""

    def __post_init__(self) -> None:
        for name in ("window", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; use 1 or more")


@dataclass(frozen=True)
class Profile:
    """A profile in memory; `layers[i]` are the sums of layer i by the names of statistics.py, Hessians left on disk."""

    base: str
    """Fingerprint of the checkpoint."""
    shape: Shape
    calibration: Mapping[str, Any]
    """Its name, fingerprint, windows, seq_len and tokens."""
    config: ProfileConfig
    layers: tuple[Mapping[str, Tensor], ...]
    folder: Path | None = None
    """Where it lies; None: nowhere."""

    @property
    def fingerprint(self) -> str:
        """Of what was profiled, on what and how; the same on every layout of ranks."""
        return fingerprint(_head(self.base, self.shape, self.calibration, self.config))

    def hessian(self, layer: int, expert: int, which: str) -> Tensor:
        """fp32 [D, D] (`hessian_in_DD`) or [F, F] (`hessian_hidden_FF`). Raises ValueError where none was taken."""
        if self.folder is None or not self.config.hessians:
            raise ValueError("this profile has no Hessians; take one with --hessians")
        with safe_open(self.folder / _layer_file(layer), framework="pt") as file:
            return file.get_tensor(f"{which}.{expert}")


def profile(
    model: StreamedModel,
    text: Calibration,
    folder: Path | str,
    config: ProfileConfig,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Profiles `model` on `text` into `folder`, where an unfinished profile of the same is continued.

    All ranks of `mesh` call this, with one file system. `progress` hears (layers done, layers in all). Raises
    ValueError where `folder` holds another profile or anything else.
    """
    mesh = mesh or single()
    folder = Path(folder)
    head = _head(model.fingerprint, model.shape, _described(text), config)
    _claim(folder, head, mesh)
    if not (folder / FILE).is_file():
        states = _States(folder, mesh)
        start = time.perf_counter()

        def finished(layer: int, sums: Mapping[str, Tensor], stream: list[Tensor]) -> None:
            states.save(layer + 1, stream)
            if mesh.world.rank == 0:
                _save(folder / _layer_file(layer), sums)
            _wait(mesh)
            states.forget(layer)
            progress(layer + 1, model.shape.layers)

        done = _done_layers(folder, model.shape.layers, mesh)
        states.forget_others(done)
        first, stream = states.newest(done)
        progress(first, model.shape.layers)
        peak = peak_of(lambda: _pass(model, text, config, mesh, None, finished, first, stream))
        if mesh.world.rank == 0:
            costs = {"seconds": round(time.perf_counter() - start, 3), "resumed_at_layer": first, "peak_bytes": peak}
            costs["predicted_bytes"] = predicted_bytes(model, text, config, mesh)
            _write(folder / COSTS, costs | {"layout": mesh.layout})
            _write(folder / FILE, head)
        _wait(mesh)
        states.forget(model.shape.layers)
        if mesh.world.rank == 0:
            (folder / _UNFINISHED).unlink(missing_ok=True)
    return read_profile(folder)


def measure(
    model: StreamedModel,
    text: Calibration,
    config: ProfileConfig,
    mesh: Mesh | None = None,
    plan: DropPlan | None = None,
) -> Profile:
    """The same in memory, of `model` as `plan` leaves it: dropped layers have no sums, and others those of their
    surviving experts, in the order kept. For re-scoring after a drop. Hessians are not kept."""
    layers: list[Mapping[str, Tensor]] = [{} for _ in range(model.shape.layers)]

    def finished(layer: int, sums: Mapping[str, Tensor], stream: list[Tensor]) -> None:
        layers[layer] = sums

    config = replace(config, hessians=False)
    _pass(model, text, config, mesh or single(), plan, finished)
    return Profile(model.fingerprint, model.shape, _described(text), config, tuple(layers))


def read_profile(folder: Path | str) -> Profile:
    """The finished profile in `folder`. Raises ValueError where there is none, or it is damaged."""
    folder = Path(folder)
    try:
        head = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if head["version"] != VERSION:
            raise ValueError(
                f"{folder}: a profile of version {head['version']}; this version of wastenot reads {VERSION}"
            )
        shape, config = shape_from(head["shape"]), ProfileConfig(**head["config"])
        layers = tuple(_load(folder / _layer_file(layer)) for layer in range(shape.layers))
        return Profile(head["base"], shape, head["calibration"], config, layers, folder)
    except FileNotFoundError as error:
        missing = Path(error.filename or FILE).name
        raise ValueError(
            f"{folder}: is no finished profile ({missing} is missing); run `wastenot compress profile`"
        ) from None
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: is damaged ({error}); profile into a new folder") from error


_ROWS_D, _ROWS_F = 3.0, 5.5
"""Matrices [rows, D] and [rows, F] alive at once where experts compute: inputs, outputs and sums of them; gate and up
rows, their product, and what the allocator keeps. Fitted to measurements on CPUs, which they meet within a tenth."""


def predicted_bytes(model: StreamedModel, text: Calibration, config: ProfileConfig, mesh: Mesh) -> int:
    """Memory that a profile needs on one rank beyond what the process has before it starts, in bytes."""
    shape, D = model.shape, model.d_model
    tokens = len(text.share(0, mesh.batch.size, config.batch).tokens_NS) * text.tokens_NS.size(1)
    stream = (min(config.window, shape.layers) + 1) * tokens * D * 4
    step_tokens = config.batch * text.tokens_NS.size(1)
    largest = 0.0
    for layer in range(shape.layers):
        size = model.size(layer)
        own = size.num_experts / mesh.expert.size
        held = 4 * (size.attention + size.feed + own * size.expert)
        rows = step_tokens * (shape.top_k if size.num_experts else 1)
        step = 4 * rows * (_ROWS_D * D + _ROWS_F * size.hidden)
        # This rank's sums, and those of all experts when they are added up over ranks and written.
        sums = (own + size.num_experts) * (D + size.hidden) * 8
        if config.hessians:
            sums += (own + size.num_experts) * (D * D + size.hidden**2) * 4
        largest = max(largest, held + step + sums)
    return int(stream + largest)


@torch.no_grad()
def _pass(
    model: StreamedModel,
    text: Calibration,
    config: ProfileConfig,
    mesh: Mesh,
    plan: DropPlan | None,
    finished: Callable[[int, Mapping[str, Tensor], list[Tensor]], None],
    first: int = 0,
    stream: list[Tensor] | None = None,
) -> None:
    """Runs layers from `first`; `finished` hears of each with its sums and the stream at the boundaries kept.

    `stream`: hidden states [N, S, D] of this rank's windows, those before layer `first` last.
    """
    mine = text.share(mesh.batch.rank, mesh.batch.size, config.batch)
    batches = [slice(start, start + config.batch) for start in range(0, len(mine.tokens_NS), config.batch)]
    if not stream:
        embedded = [model.embed(mine.tokens_NS[batch].to(mesh.device)) for batch in batches]
        stream = [torch.cat(embedded)]
        del embedded
    for number in range(first, model.shape.layers):
        if plan is not None and number in plan.blocks:
            continue
        layer = read_planned(model, number, plan, (mesh.expert.rank, mesh.expert.size))
        sums = LayerSums(layer, mesh, config.window, config.hessians)
        stream.append(torch.empty_like(stream[-1]))
        for batch in batches:
            h_BSD, mask_BS = stream[-2][batch], mine.mask_NS[batch].to(mesh.device)
            stream[-1][batch] = block(layer, h_BSD, mask_BS, mesh, sums)
            after_TD = stream[-1][batch][mask_BS]
            for gap, earlier in enumerate(reversed(stream[:-1])):
                cosines_T = torch.cosine_similarity(earlier[batch][mask_BS], after_TD, dim=-1)
                sums.sums["block_cosine_W"][gap] += cosines_T.double().sum()
        stream = stream[-config.window :]
        reduced = {name: tensor.cpu() for name, tensor in sums.reduced(mesh)}
        finished(number, reduced, stream)
        del layer, sums


def block(layer: StreamedLayer, h_BSD: Tensor, mask_BS: Tensor, mesh: Mesh, sums: LayerSums | None = None) -> Tensor:
    """The stream behind `layer`; padded tokens pass no feed-forward network, and nobody reads them."""
    a_BSD = layer.attend(h_BSD)
    if not layer.num_experts and not layer.is_dense:
        if sums is not None:
            sums.sums["tokens"] += int(mask_BS.sum())
        return a_BSD
    a_TD = a_BSD[mask_BS]
    x_TD = layer.norm(a_BSD)[mask_BS]
    if layer.is_dense:
        y_TD = layer.dense(x_TD)
    else:
        choice = layer.route(x_TD)
        y_TD = moe_output(layer, x_TD, choice, mesh, None if sums is None else sums.add_rows)
        if sums is not None:
            sums.add_choice(choice)
    b_TD = a_TD + y_TD
    if sums is not None:
        sums.add_residual(a_TD, b_TD)
    return a_BSD.masked_scatter(mask_BS[..., None], b_TD)


class _States:
    """The residual stream between two layers on disk, each rank's own, so that a killed profile goes on."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self.folder, self.mesh = folder, mesh

    def _path(self, layer: int) -> Path:
        rank, ranks = self.mesh.world.rank, self.mesh.world.size
        # Windows of text are shared by all ranks: with another number of them these are others.
        return self.folder / f"state-{layer:04d}-rank-{rank}-of-{ranks}.safetensors"

    def save(self, layer: int, stream: list[Tensor]) -> None:
        """What is before `layer`; on the disk on all ranks when this returns."""
        _save(self._path(layer), {str(i): each.contiguous().cpu() for i, each in enumerate(stream)})
        _wait(self.mesh)

    def newest(self, done: int) -> tuple[int, list[Tensor]]:
        """The layer to go on at and the stream before it: after `done` layers where all ranks have their states."""
        found = torch.tensor([int(self._path(done).is_file())])
        if self.mesh.world.group is not None:
            dist.all_reduce(found, dist.ReduceOp.MIN, self.mesh.world.group)
        if not done or not found.item():
            return 0, []
        saved = _load(self._path(done))
        return done, [saved[str(i)].to(self.mesh.device) for i in range(len(saved))]

    def forget(self, layer: int) -> None:
        self._path(layer).unlink(missing_ok=True)

    def forget_others(self, layer: int) -> None:
        """Removes what a killed process left half-written, and states before other layers or of other ranks."""
        if self.mesh.world.rank == 0:
            mine = f"state-{layer:04d}-rank-*-of-{self.mesh.world.size}.safetensors"
            for path in {*self.folder.glob(".*.partial"), *self.folder.glob("state-*")} - {*self.folder.glob(mine)}:
                path.unlink(missing_ok=True)
        _wait(self.mesh)


def _head(base: str, shape: Shape, calibration: Mapping[str, Any], config: ProfileConfig) -> dict[str, Any]:
    # Through JSON: what is read back compares equal.
    plain = {"base": base, "shape": asdict(shape), "calibration": dict(calibration), "config": asdict(config)}
    return json.loads(json.dumps({"version": VERSION, **plain}))


def _described(text: Calibration) -> dict[str, Any]:
    windows, seq_len = text.tokens_NS.shape
    return {
        "name": text.name,
        "fingerprint": text.fingerprint,
        "windows": windows,
        "seq_len": seq_len,
        "tokens": text.num_tokens,
    }


_UNFINISHED = "unfinished.json"


def _claim(folder: Path, head: dict[str, Any], mesh: Mesh) -> None:
    """Makes `folder` the place of this profile. Raises ValueError, on all ranks, where it is that of another."""
    for name in (FILE, _UNFINISHED):
        path = folder / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found != head:
                differs = next(key for key in head if found.get(key) != head[key])
                raise ValueError(f"{folder}: holds a profile of another {differs}; name a new folder")
            return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is no profile; name a new folder")
    _wait(mesh)
    if mesh.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / _UNFINISHED, head)
    _wait(mesh)


def _done_layers(folder: Path, layers: int, mesh: Mesh) -> int:
    done = next((layer for layer in range(layers) if not (folder / _layer_file(layer)).is_file()), layers)
    # Everybody has looked before anybody writes.
    _wait(mesh)
    return done


def _wait(mesh: Mesh) -> None:
    if mesh.world.group is not None:
        dist.barrier(mesh.world.group)


def _layer_file(layer: int) -> str:
    return f"layer-{layer:04d}.safetensors"


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file(dict(tensors), partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(None, None, str(path))
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if not name.startswith("hessian_")}  # noqa: SIM118


def _write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)
