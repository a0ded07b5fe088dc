"""A drop plan: what of a checkpoint goes, what stays, and in what form, as a small YAML file. Torch-free.

A plan is declarative and holds no tensor: `apply` is a pure function of a checkpoint and a plan (METHODS C6). It names
the checkpoint it was made for by fingerprint, so that it is never applied to another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

__all__ = ["DropPlan", "Quantize", "Shape", "Slim", "fingerprint", "read_plan", "shape_from", "write_plan"]

VERSION = 1

Method = Literal["wanda", "sparsegpt", "magnitude"]
Pattern = Literal["unstructured", "2:4", "4:8"]
Semantics = Literal["reroute", "skip"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a plan can cut: the layers of a checkpoint and their experts."""

    experts: tuple[int, ...]
    """Routed experts of each layer; 0 where it has none."""
    top_k: int
    dense: tuple[int, ...] = ()
    """Layers with a dense feed-forward network. Those with neither only attend."""
    groups: int = 1
    """Groups of experts of a group-limited router."""
    top_groups: int = 1
    """... of which a token may use this many."""

    @property
    def layers(self) -> int:
        return len(self.experts)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts, in order."""
        return tuple(layer for layer, experts in enumerate(self.experts) if experts)


@dataclass(frozen=True, kw_only=True)
class Slim:
    """Weights of experts set to zero (METHODS C4); routers are never touched."""

    method: Method = "wanda"
    pattern: Pattern = "unstructured"
    """2:4 zeroes two of every four neighbours along the input, whatever `sparsity` says; 4:8 four of eight."""
    sparsity: float = 0.5

    def __post_init__(self) -> None:
        _one_of(self, "method", Method)
        _one_of(self, "pattern", Pattern)
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity: {self.sparsity} is outside (0, 1); use for example 0.5")
        if self.pattern != "unstructured" and self.sparsity != 0.5:
            raise ValueError(f"sparsity: {self.sparsity} is not the 0.5 of pattern {self.pattern}; use 0.5")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Weights of linear layers in few bits (METHODS C4); routers, norms, embedding and output layer stay."""

    bits: int = 4
    group: int = 32
    """Neighbours along the input that share a scale; with 8 bits a whole row does."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits: {self.bits} is not 4 or 8; use {4 if self.bits < 6 else 8}")
        if self.group < 16 or self.group & (self.group - 1):
            raise ValueError(f"group: {self.group} is not a power of two of 16 or more; use 32")


@dataclass(frozen=True, kw_only=True)
class DropPlan:
    """What goes. Numbers of layers and experts are those of the checkpoint that the plan was made for."""

    base: str
    """Fingerprint of that checkpoint."""
    shape: Shape
    blocks: tuple[int, ...] = ()
    """Block Drop: whole layers that go, ascending."""
    layers: tuple[int, ...] = ()
    """Layer Drop: layers that keep attention and lose norm, router, experts and shared experts, ascending."""
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Expert Drop: layer -> experts that go, ascending. No layer of `blocks` or `layers`, none empty."""
    semantics: Semantics = "reroute"
    """`reroute`: router rows go too, tokens choose among those left; `skip`: they stay, and a token that chooses a
    dropped expert loses that part. The weights of skipped experts become zero, and stay."""
    order: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Layer -> surviving experts in the order they are stored, so that equal shares of them are equally loaded."""
    slim: Slim | None = None
    quantize: Quantize | None = None
    profile: str = ""
    """Fingerprint of the profile that the decisions, or the weights of `slim`, rest on."""
    criteria: Mapping[str, str] = field(default_factory=dict)
    """What was decided by which score, for the reader: `blocks: cosine, discrete`."""

    def __post_init__(self) -> None:
        _check(self)

    def kept(self, layer: int) -> tuple[int, ...]:
        """Experts of `layer` that stay, in the order they are stored; all of them under `skip`."""
        if layer in self.blocks or layer in self.layers:
            return ()
        if layer in self.order:
            return self.order[layer]
        gone = self.experts.get(layer, ()) if self.semantics == "reroute" else ()
        return tuple(expert for expert in range(self.shape.experts[layer]) if expert not in gone)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Numbers of the layers that stay: layer i of the result was survivors[i]."""
        return tuple(layer for layer in range(self.shape.layers) if layer not in self.blocks)

    @property
    def result(self) -> Shape:
        """The shape of what is left."""
        left = self.survivors
        dense = tuple(new for new, old in enumerate(left) if old in self.shape.dense and old not in self.layers)
        return replace(self.shape, experts=tuple(len(self.kept(layer)) for layer in left), dense=dense)

    @property
    def hash(self) -> str:
        """Of all decisions; equal for equal plans, whatever their scores or their file's layout."""
        return _digest(_plain(self))


def fingerprint(description: Any) -> str:
    """A short name of a JSON value, by content."""
    return _digest(description)


def write_plan(plan: DropPlan, path: Path | str) -> None:
    """Writes `plan` for people: YAML, a comment of what it leaves, nothing that says nothing. Atomic."""
    path = Path(path)
    left = plan.result
    moe = [experts for experts in left.experts if experts]
    note = (
        f"# {len(left.experts)} of {plan.shape.layers} blocks stay, {len(moe)} of {len(plan.shape.moe_layers)} MoE "
        f"layers, {sum(moe)} of {sum(plan.shape.experts)} experts. Plan {plan.hash}\n"
    )
    text = note + yaml.safe_dump(_plain(plan), sort_keys=False, default_flow_style=None, width=110)
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def read_plan(path: Path | str) -> DropPlan:
    """The plan in the file at `path`, written by `write_plan` or edited. Raises ValueError where it is none."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as a plan ({' '.join(str(error).split())})") from error
    try:
        return _from_plain(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no drop plan ({error!r}); make one with `wastenot compress plan`") from error


def shape_from(plain: Mapping[str, Any]) -> Shape:
    """The `Shape` whose fields YAML or JSON holds. Raises TypeError or ValueError where it holds others."""
    given = dict(plain)
    lists = {name: _numbers(given.pop(name, ())) for name in ("experts", "dense")}
    return Shape(experts=lists["experts"], dense=lists["dense"], **{name: int(value) for name, value in given.items()})


def _plain(plan: DropPlan) -> dict[str, Any]:
    """As YAML and JSON have it; what is empty is left out."""
    plain: dict[str, Any] = {"version": VERSION}
    for each in fields(plan):
        value = getattr(plan, each.name)
        if isinstance(value, Shape | Slim | Quantize):
            value = {f.name: _list(getattr(value, f.name)) for f in fields(value)}
        elif isinstance(value, Mapping):
            value = {key: _list(value[key]) for key in sorted(value)}
        else:
            value = _list(value)
        if value or each.name == "base":
            plain[each.name] = value
    return plain


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _from_plain(raw: dict[str, Any]) -> DropPlan:
    given = dict(raw)
    version = given.pop("version")
    if version != VERSION:
        raise ValueError(f"version: {version} is unknown; this version of wastenot reads {VERSION}")
    known = {each.name for each in fields(DropPlan)}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{unknown[0]}: unknown key; use one of {', '.join(sorted(known))}")
    for name in ("blocks", "layers"):
        given[name] = _numbers(given.get(name, ()))
    for name in ("experts", "order"):
        given[name] = {int(layer): _numbers(ids) for layer, ids in given.get(name, {}).items()}
    given["shape"] = shape_from(given["shape"])
    if given.get("slim") is not None:
        given["slim"] = Slim(**given["slim"])
    if given.get("quantize") is not None:
        given["quantize"] = Quantize(**given["quantize"])
    return DropPlan(**given)


def _numbers(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _one_of(owner: object, name: str, kind: Any) -> None:
    choices, value = get_args(kind), getattr(owner, name)
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")


def _check(plan: DropPlan) -> None:
    """Raises ValueError where `plan` drops what is not there, or leaves what cannot run."""
    shape = plan.shape
    _one_of(plan, "semantics", Semantics)
    for name in ("blocks", "layers"):
        _ascending(name, getattr(plan, name), shape.layers, "layers")
    if len(plan.blocks) >= shape.layers:
        raise ValueError(f"blocks: {len(plan.blocks)} of {shape.layers} layers go; leave one at least")
    if both := sorted({*plan.blocks} & {*plan.layers}):
        raise ValueError(f"layers: {both[0]} goes with its whole block already; name it once")
    for layer in plan.layers:
        if not shape.experts[layer] and layer not in shape.dense:
            raise ValueError(
                f"layers: {layer} has no feed-forward network to drop; choose of {_list(shape.moe_layers)}"
            )
    for layer, gone in plan.experts.items():
        _check_experts(plan, layer, gone)
    for layer, order in plan.order.items():
        if not 0 <= layer < shape.layers:
            raise ValueError(f"order: there is no layer {layer}; the last is {shape.layers - 1}")
        gone = plan.experts.get(layer, ()) if plan.semantics == "reroute" else ()
        if sorted(order) != [expert for expert in range(shape.experts[layer]) if expert not in gone]:
            raise ValueError(f"order.{layer}: {_list(order)} is no order of the experts that stay in that layer")
        width, each = shape.experts[layer] // shape.groups, max(1, len(order) // shape.groups)
        if shape.groups > 1 and any(expert // width != place // each for place, expert in enumerate(order)):
            raise ValueError(
                f"order.{layer}: {_list(order)} moves experts between the {shape.groups} groups of the router, which "
                "changes what it chooses; reorder inside groups only"
            )


def _check_experts(plan: DropPlan, layer: int, gone: tuple[int, ...]) -> None:
    shape = plan.shape
    if not 0 <= layer < shape.layers or not shape.experts[layer]:
        raise ValueError(f"experts: layer {layer} has none; choose of {_list(shape.moe_layers)}")
    if layer in plan.blocks or layer in plan.layers:
        raise ValueError(f"experts.{layer}: that layer's experts go already; leave it out")
    count = shape.experts[layer]
    _ascending(f"experts.{layer}", gone, count, "experts")
    if not gone:
        raise ValueError(f"experts.{layer}: names none; leave it out")
    if plan.semantics == "skip":
        return
    left = count - len(gone)
    if left < shape.top_k:
        raise ValueError(
            f"experts.{layer}: {len(gone)} of {count} go, which leaves {left} for top-{shape.top_k}; drop at most "
            f"{count - shape.top_k}, or the whole layer"
        )
    if shape.groups > 1:
        width = count // shape.groups
        per_group = [sum(expert // width == group for expert in gone) for group in range(shape.groups)]
        if len(set(per_group)) > 1:
            raise ValueError(
                f"experts.{layer}: {per_group} go from the {shape.groups} groups, whose router needs equal ones; drop "
                f"the same number from each"
            )
        if (width - per_group[0]) * shape.top_groups < shape.top_k:
            raise ValueError(
                f"experts.{layer}: {width - per_group[0]} experts are left in each group, too few for "
                f"top-{shape.top_k} in {shape.top_groups} of them; drop fewer"
            )


def _ascending(name: str, values: tuple[int, ...], size: int, what: str) -> None:
    if list(values) != sorted(set(values)):
        raise ValueError(f"{name}: {_list(values)} is not ascending, each once; use {sorted(set(values))}")
    if values and not (values[0] >= 0 and values[-1] < size):
        wrong = values[0] if values[0] < 0 else values[-1]
        raise ValueError(f"{name}: there is no {wrong}; this checkpoint has {size} {what}, 0 to {size - 1}")
