"""Measured figures of one machine that replace assumed ones: a versioned YAML file, read, written, applied, compared.

    version: 1
    machine: 2 ranks on NVIDIA H100 80GB HBM3               what was measured, in words
    date: '2026-11-20'
    versions: {torch: 2.13.0}
    cluster: h100-nvlink8-ib                                whose figures it replaces, and whose links it names
    device: {launch: 4us, bandwidth: 3.1TB/s,               any of memory, bandwidth, launch, peak
      peak: {bf16: 730TFLOP/s}}
    efficiency: {matmul: 0.71}                              any of a cluster's
    links: {nvlink: {latency: 2.4us, all_to_all: 0.66}}     any figure of a link, by the link's name
    layers:                                                 seconds of operators, backward operators and windows
      moe: {work: 1f0c..., seconds: {expert up: 812us, expert up backward: 1.7ms, dispatch: 640us}}
    notes: [layers.dense was not measured; ...]             what is left to the cost model, and why; what is doubtful
    samples: {nvlink all-to-all: [[1048576.0, 4.1e-05]]}    bytes that a rank sent and seconds, which links come from

`work` is the fingerprint of model, layout and skew that the times are of: they serve no other. All but `version` may be
missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .cluster import LINK_UNITS, Cluster, Efficiency, link_value
from .layout import Layout
from .nearest import refuse_other_than, refuse_unknown_keys, suggestion
from .plain import digest, read_yaml
from .problem import Backward, Layer, Operator, Window
from .routing_skew import Skew
from .shape import ModelShape
from .steps import LayerWork
from .units import Unit, parse_quantity, show_quantity

Part = TypeVar("Part", Operator, Window, Backward, Backward | Window)

VERSION = 1
_DEVICE: Mapping[str, Unit] = {"memory": "B", "bandwidth": "B/s", "launch": "s"}


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Measured seconds of one layer's parts."""

    work: str
    """`fingerprint` of what they were measured on."""
    seconds: Mapping[str, float]
    """By name of an operator, a backward operator or a window."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured."""

    machine: str = ""
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    cluster: str = ""
    """Whose figures were assumed before, and whose links the links are."""
    device: Mapping[str, float] = field(default_factory=dict)
    """Bytes, bytes/s and seconds; peaks stand apart."""
    peak: Mapping[str, float] = field(default_factory=dict)
    """FLOP/s by dtype: in the file, `device.peak`."""
    efficiency: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    layers: Mapping[str, LayerTimes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    samples: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """By link and collective: bytes that one rank sent, and seconds. They are for readers: nothing uses them."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One part of a layer: what was predicted, and what was measured."""

    name: str
    predicted: float
    """Seconds."""
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted: above 1 where the prediction was too good."""
        return self.measured / self.predicted if self.predicted else float("inf")


def fingerprint(shape: ModelShape, layout: Layout, skew: Skew) -> str:
    """16 hexadecimal digits that differ where the work of a layer does.

    Degrees of pipeline and data parallelism and the number of micro-batches change no layer's work and do not enter,
    nor does how optimizer states are cut.
    """
    of_layer = {
        key: value
        for key, value in asdict(layout).items()
        if key not in ("pipeline", "data", "chunks", "micro_batches", "zero", "gradients", "weights", "loss_chunk")
    }
    of_model = {key: value for key, value in asdict(shape).items() if key not in ("name", "layers", "dense_layers")}
    of_skew = {key: value for key, value in asdict(skew).items() if key != "name"}
    return digest([of_model, of_layer, of_skew])


def calibrated(cluster: Cluster, calibration: Calibration) -> Cluster:
    """`cluster` with what was measured. Raises ValueError where a link of that name is none of the cluster's."""
    for name in calibration.links:
        refuse_other_than(name, [link.name for link in cluster.links], f"calibration: links of {cluster.name}")
    links = tuple(replace(link, **calibration.links.get(link.name, {})) for link in cluster.links)
    return replace(
        cluster,
        device=replace(cluster.device, **calibration.device, peak={**cluster.device.peak, **calibration.peak}),
        efficiency=replace(cluster.efficiency, **calibration.efficiency),
        links=links,
    )


def timed(layer: Layer, calibration: Calibration, work: str) -> Layer:
    """`layer` with measured times where there are some. Raises ValueError where those are of other work than `work`."""
    times = calibration.layers.get(layer.name)
    if times is None:
        return layer
    _check(layer, times, work)

    def measured(each: Part) -> Part:
        return replace(each, seconds=times.seconds.get(each.name, each.seconds))

    return replace(
        layer,
        operators=tuple(map(measured, layer.operators)),
        forward=tuple(map(measured, layer.forward)),
        backward=tuple(map(measured, layer.backward)),
    )


def timed_work(work: LayerWork, calibration: Calibration, same: str) -> LayerWork:
    """`work` with measured times where there are some; of a measured backward, gradients of weights take the part that
    was predicted. Raises ValueError as `timed` does.
    """
    layer = timed(work.layer, calibration, same)
    predicted, measured = _parts(work.layer), _parts(layer)
    weights = {
        name: seconds * measured[name] / predicted[name] if predicted[name] else seconds
        for name, seconds in work.weight_gradients.items()
    }
    return replace(work, layer=layer, weight_gradients=weights)


def drift(layer: Layer, calibration: Calibration, work: str) -> tuple[Drift, ...]:
    """Every measured part of `layer` beside its prediction, the one that is off by most seconds first.

    Raises ValueError as `timed` does.
    """
    times = calibration.layers.get(layer.name)
    if times is None:
        return ()
    _check(layer, times, work)
    predicted = _parts(layer)
    found = [Drift(name=name, predicted=predicted[name], measured=value) for name, value in times.seconds.items()]
    return tuple(sorted(found, key=lambda each: -abs(each.measured - each.predicted)))


def _parts(layer: Layer) -> dict[str, float]:
    """Seconds by name; a collective and its window have one name and one time."""
    return {each.name: each.seconds for each in (*layer.operators, *layer.forward, *layer.backward)}


def _check(layer: Layer, times: LayerTimes, work: str) -> None:
    if times.work != work:
        raise ValueError(
            f"calibration: layers.{layer.name}: measured on other work ({times.work}) than this ({work}); measure "
            "again with this model, layout and skew, or leave layers out of the file"
        )
    known = _parts(layer)
    for name in times.seconds:
        if name not in known:
            raise ValueError(f"calibration: layers.{layer.name}: no part is called {name!r}; {suggestion(name, known)}")


def read_calibration(path: str | Path) -> Calibration:
    """What `write_calibration` wrote, or a hand.

    Raises ValueError in one line: no such file, another version, an unknown key, a missing unit, a value out of range.
    """
    return calibration_from(read_yaml(path, "calibration"), str(path))


def calibration_from(given: Any, where: str) -> Calibration:
    """The calibration in plain values; errors name `where` they are from."""
    keys = tuple(each.name for each in fields(Calibration) if each.name != "peak")
    top = _mapping(given, where, ("version", *keys))
    if top.get("version") != VERSION:
        raise ValueError(f"{where}: version: {top.get('version')!r} is not read here; use {VERSION}, measured anew")
    links = _mapping(top.get("links", {}), f"{where}: links", None)
    layers = _mapping(top.get("layers", {}), f"{where}: layers", None)
    device = dict(_mapping(top.get("device", {}), f"{where}: device", (*_DEVICE, "peak")))
    peaks = _mapping(device.pop("peak", {}), f"{where}: device.peak", None)
    versions = _mapping(top.get("versions", {}), f"{where}: versions", None)
    efficiency = _mapping(
        top.get("efficiency", {}), f"{where}: efficiency", tuple(each.name for each in fields(Efficiency))
    )
    return Calibration(
        machine=str(top.get("machine", "")),
        date=str(top.get("date", "")),
        versions={str(name): str(version) for name, version in versions.items()},
        cluster=str(top.get("cluster", "")),
        peak={
            str(dtype): parse_quantity(peak, "FLOP/s", f"{where}: device.peak.{dtype}") for dtype, peak in peaks.items()
        },
        device={key: parse_quantity(value, _DEVICE[key], f"{where}: device.{key}") for key, value in device.items()},
        # A part of 1, as of a link.
        efficiency={
            key: link_value("collective", value, f"{where}: efficiency.{key}") for key, value in efficiency.items()
        },
        links={
            str(name): {
                key: link_value(key, value, f"{where}: links.{name}.{key}")
                for key, value in _mapping(link, f"{where}: links.{name}", tuple(LINK_UNITS)).items()
            }
            for name, link in links.items()
        },
        layers={str(name): _times(layer, f"{where}: layers.{name}") for name, layer in layers.items()},
        notes=tuple(map(str, top.get("notes") or ())),
        samples=_samples(top.get("samples", {}), f"{where}: samples"),
    )


def write_calibration(calibration: Calibration, path: str | Path) -> None:
    """As YAML that `read_calibration` reads back as it is."""
    peaks = {dtype: show_quantity(peak, "FLOP/s") for dtype, peak in calibration.peak.items()}
    plain = {
        "version": VERSION,
        "machine": calibration.machine,
        "date": calibration.date,
        "versions": dict(calibration.versions),
        "cluster": calibration.cluster,
        "device": {key: show_quantity(value, _DEVICE[key]) for key, value in calibration.device.items()}
        | ({"peak": peaks} if peaks else {}),
        "efficiency": dict(calibration.efficiency),
        "links": {
            name: {
                key: value if (unit := LINK_UNITS[key]) is None else show_quantity(value, unit)
                for key, value in link.items()
            }
            for name, link in calibration.links.items()
        },
        "layers": {
            name: {
                "work": times.work,
                "seconds": {part: show_quantity(value, "s") for part, value in times.seconds.items()},
            }
            for name, times in calibration.layers.items()
        },
        "notes": list(calibration.notes),
        "samples": {name: [list(pair) for pair in pairs] for name, pairs in calibration.samples.items()},
    }
    Path(path).write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _times(given: Any, where: str) -> LayerTimes:
    section = _mapping(given, where, ("work", "seconds"))
    seconds = _mapping(section.get("seconds", {}), f"{where}.seconds", None)
    return LayerTimes(
        work=str(section.get("work", "")),
        seconds={str(name): parse_quantity(value, "s", f"{where}.{name}") for name, value in seconds.items()},
    )


def _samples(given: Any, where: str) -> dict[str, tuple[tuple[float, float], ...]]:
    try:
        pairs = {str(name): [(float(size), float(s)) for size, s in those] for name, those in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{where}: no lists of [bytes, seconds] by name; leave them out, or measure again") from None
    return {name: tuple(those) for name, those in pairs.items()}


def _mapping(given: Any, where: str, keys: tuple[str, ...] | None) -> Mapping[Any, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: {given!r} is no mapping" + (f"; its keys are {', '.join(keys)}" if keys else ""))
    if keys is not None:
        refuse_unknown_keys(given, keys, where)
    return given
