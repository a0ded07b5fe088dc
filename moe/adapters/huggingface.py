"""Hugging Face checkpoints into our models and back, tensor by tensor; and where its other adapters are found.

Neither direction holds more than one file's worth of weights beside the model, and each rank reads only the
experts it owns. Works on safetensors and our own modules; transformers is not imported.

For models of transformers that stay its own: `rectify_` (huggingface_rectify.py), `recompute_`
(huggingface_recompute.py), and for its Trainer `optimizer` (huggingface_trainer.py). Each is imported when it is
asked for, so that checkpoints need no method.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...parallel.consult import consult
from ...parallel.mesh import Mesh
from ..config import RouterConfig
from ..decoder import Decoder
from ..layer import MoELayer
from .huggingface_config import config_from_huggingface, config_to_huggingface
from .huggingface_names import FAMILIES, Family, Piece, pieces, to_huggingface

if TYPE_CHECKING:
    from .huggingface_recompute import recompute_, unrecompute_
    from .huggingface_rectify import rectify_, routings_of, unrectify_
    from .huggingface_trainer import name_parameters_, optimizer

__all__ = [
    "CONFIG",
    "FAMILIES",
    "Family",
    "StoredWeights",
    "config_from_huggingface",
    "config_to_huggingface",
    "disk_shapes",
    "load_huggingface",
    "name_parameters_",
    "optimizer",
    "recompute_",
    "rectify_",
    "routings_of",
    "save_huggingface",
    "to_huggingface",
    "unrecompute_",
    "unrectify_",
]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_ELSEWHERE = {
    "rectify_": "huggingface_rectify",
    "unrectify_": "huggingface_rectify",
    "routings_of": "huggingface_rectify",
    "recompute_": "huggingface_recompute",
    "unrecompute_": "huggingface_recompute",
    "optimizer": "huggingface_trainer",
    "name_parameters_": "huggingface_trainer",
}
"""File of each name that is found here and defined there."""

_LISTED = 12
"""Names an error message lists of each kind before it only counts."""


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ELSEWHERE[name]}", __package__), name)


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder by their names on disk; each is read when it is asked for."""

    def __init__(self, folder: Path | str) -> None:
        """Raises ValueError where `folder` has no safetensors or a file of its index is missing or damaged."""
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        for path in self._paths():
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def _paths(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / WEIGHTS).is_file():
                raise ValueError(f"{self.folder}: has neither {WEIGHTS} nor {INDEX}; give a folder of safetensors")
            return [self.folder / WEIGHTS]
        try:
            return [self.folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: is no index of safetensors ({error!r})") from error

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())


@dataclass(frozen=True)
class _Home:
    """Where a piece lives: the parameter on this rank, and the experts of it that this rank holds."""

    piece: Piece
    parameter: Tensor
    experts: range
    """All of the parameter's experts that are here; empty for a weight without an expert dimension."""

    @property
    def is_here(self) -> bool:
        return self.piece.expert is None or self.piece.expert in self.experts

    @property
    def owner(self) -> int:
        """Rank of the expert axis that holds it."""
        return 0 if self.piece.expert is None else self.piece.expert // len(self.experts)

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return self.parameter.element_size() * torch.Size(self.piece.shape).numel()

    def view(self) -> Tensor:
        """The piece as a part of the parameter; only where it is here."""
        return self.piece.of(self.parameter.detach(), self.experts.start)


def disk_shapes(model: Decoder, family: Family) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors on disk of `model`, experts on other ranks included; `model` may be on meta."""
    return {home.piece.name: home.piece.shape for home in _homes(model, family)}


@torch.no_grad()
def load_huggingface(model: Decoder, source: Path | str | Mapping[str, Tensor], family: Family) -> None:
    """Fills the weights of `model` in place from a checkpoint in the names of `family`; values are cast to its dtype.

    source: a folder of safetensors (one file, or several with an index), or name on disk -> tensor. Under expert
    parallelism every rank calls this and reads its own experts only.

    Raises ValueError, before anything is changed and on every rank alike, listing all names that are missing,
    unexpected, or of another shape; or where tensor ranks share weights.
    """
    _refuse_cut_weights(model.mesh)
    stored = StoredWeights(source) if isinstance(source, str | Path) else source
    homes = list(_homes(model, family))
    _check(homes, stored, tied=model.head is None)
    for home in homes:
        if home.is_here:
            home.view().copy_(stored[home.piece.name])
    for layer in _moe_layers(model).values():
        layer.router.bias_E.zero_()


def save_huggingface(
    model: Decoder,
    folder: Path | str,
    family: Family,
    *,
    max_positions: int = 4096,
    end_token: int | None = None,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes `model` as a checkpoint that stock models of `family` load: safetensors and config.json.

    Every rank calls this; rank 0 writes, receiving the experts of other ranks one file of at most `shard_bytes` (or
    one tensor, if that is larger) at a time. `folder` appears when it is complete. See `config_to_huggingface` for
    the other arguments.

    Raises ValueError on every rank where the family cannot say what the model computes, tensor ranks share weights, or
    `folder` exists and is not empty; OSError where it cannot be written.
    """
    folder = Path(folder)
    _refuse_cut_weights(model.mesh)
    layers = _moe_layers(model)
    # A dense model has no router, and nothing that is said of one matters.
    router = next((layer.router.config for layer in layers.values()), RouterConfig())
    config = config_to_huggingface(model.config, router, family, max_positions=max_positions, end_token=end_token)
    _refuse_biases(layers)
    shards = _divide(_homes(model, family), shard_bytes)
    names = _file_names(len(shards))
    mesh = model.mesh
    partial = folder.with_name(f".{folder.name}.partial")
    _on_root(mesh, lambda: _begin(folder, partial))
    for name, shard in zip(names, shards, strict=True):
        tensors = _gather(shard, mesh)
        _on_root(mesh, lambda name=name, tensors=tensors: save_file(tensors, partial / name, {"format": "pt"}))
    config["torch_dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    _on_root(mesh, lambda: _finish(folder, partial, config, names, shards))


def _refuse_cut_weights(mesh: Mesh) -> None:
    for axis in (mesh.pipeline, mesh.shard, mesh.tensor):
        if axis.size > 1:
            raise ValueError(f"{axis.name}: {axis.size} ranks share the weights; convert a checkpoint, in one process")


def _moe_layers(model: Decoder) -> dict[str, MoELayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def _homes(model: Decoder, family: Family) -> Iterator[_Home]:
    """Every tensor on disk of the whole model, in the order of its parameters: the same on every rank."""
    layers = _moe_layers(model)
    experts_of = {
        f"{prefix}.experts.{name}": layer
        for prefix, layer in layers.items()
        for name in layer.experts.expert_parameters
    }
    for name, parameter in model.named_parameters():
        layer = experts_of.get(name)
        shape = parameter.shape if layer is None else (layer.dispatcher.num_experts, *parameter.shape[1:])
        experts = range(0) if layer is None else layer.dispatcher.local
        assert layer is None or parameter.size(0) == len(experts), f"{name} is not parallelized"
        for piece in pieces(name, shape, family):
            yield _Home(piece, parameter, experts)


def _check(homes: list[_Home], stored: Mapping[str, Tensor], tied: bool) -> None:
    """Raises ValueError unless `stored` has exactly these tensors."""
    shape_of = stored.shape if isinstance(stored, StoredWeights) else lambda name: tuple(stored[name].shape)
    wanted = {home.piece.name: home.piece.shape for home in homes}
    # Old checkpoints keep the frequencies of the rotary embedding, which follow from its theta.
    found = {name for name in stored if not name.endswith(".rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if tied and {head, embedding} <= found:
        if not torch.equal(stored[head], stored[embedding]):
            raise ValueError(f"{head} differs from {embedding}, but the model ties them; use tie_embeddings: false")
        found.remove(head)
    other_shapes = [
        f"{name} {list(shape_of(name))} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and shape_of(name) != shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": sorted(found - wanted.keys()),
        "of another shape": other_shapes,
    }
    lines = [f"{kind} ({len(names)}): {_listed(names)}" for kind, names in kinds.items() if names]
    if lines:
        where = f"{stored.folder}: these" if isinstance(stored, StoredWeights) else "these"
        raise ValueError("\n".join([f"{where} are not the weights of this model;", *lines]))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _refuse_biases(layers: Mapping[str, MoELayer]) -> None:
    for name, layer in layers.items():
        if layer.router.bias_E.any():
            raise ValueError(f"{name}: its selection bias is not zero, and stock routers have none")


def _divide(homes: Iterator[_Home], shard_bytes: int) -> list[list[_Home]]:
    """Consecutive pieces together, up to `shard_bytes`."""
    shards: list[list[_Home]] = []
    held = 0
    for home in homes:
        if not shards or held + home.num_bytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(home)
        held += home.num_bytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _gather(shard: list[_Home], mesh: Mesh) -> dict[str, Tensor]:
    """On rank 0 the tensors of one file, in host memory; its first copy of the experts sends what rank 0 lacks."""
    tensors: dict[str, Tensor] = {}
    if mesh.expert_data.rank > 0:
        return tensors
    for home in shard:
        if mesh.expert.rank == 0:
            if home.is_here:
                tensor = home.view()
            else:
                tensor = home.parameter.new_empty(home.piece.shape)
                dist.recv(tensor, group=mesh.expert.group, group_src=home.owner)
            tensors[home.piece.name] = tensor.cpu().contiguous()
        elif home.owner == mesh.expert.rank:
            dist.send(home.view().contiguous(), group=mesh.expert.group, group_dst=0)
    return tensors


def _on_root(mesh: Mesh, work: Callable[[], object]) -> None:
    """Does `work` on rank 0 while all wait; where it fails, all ranks raise."""

    def alone(answers: list[None]) -> list[None]:
        work()
        return answers

    consult(mesh.world.group, lambda: None, alone, mesh.recorder)


def _begin(folder: Path, partial: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists; name a new folder, so that no old file stays among the new")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _finish(folder: Path, partial: Path, config: dict[str, Any], names: list[str], shards: list[list[_Home]]) -> None:
    """Writes what describes the weights, and gives the folder its name."""
    if len(names) > 1:
        total = sum(home.num_bytes for shard in shards for home in shard)
        weight_map = {home.piece.name: name for name, shard in zip(names, shards, strict=True) for home in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)
