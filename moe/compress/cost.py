"""What a plan costs: parameters, bytes on disk, and seconds of a step as this machine takes them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...parallel.mesh import single
from .calibration import Calibration
from .forward import moe_output
from .plan import DropPlan
from .streamed import StreamedModel

__all__ = ["LayerSeconds", "bytes_of", "parameters_of", "seconds_of", "time_layers"]

_SCALE_BYTES = 2
"""Of a scale, in bf16: with 4 bits one for each group of weights; with 8 one for each row, which is next to nothing."""


def parameters_of(plan: DropPlan, model: StreamedModel) -> int:
    """Parameters that `plan` leaves; zeros of slimming and skipped experts count, as they stay stored."""
    return model.outside_size + sum(sum(_parts(plan, model, layer)) for layer in plan.survivors)


def bytes_of(plan: DropPlan, model: StreamedModel) -> int:
    """Bytes on disk of what `plan` leaves. Quantized, all but routers, norms, embedding and output layer is; the former
    two are too small to be counted apart."""
    if plan.quantize is None:
        return parameters_of(plan, model) * model.element_bytes
    few = plan.quantize
    per_weight = few.bits / 8 + (_SCALE_BYTES / few.group if few.bits == 4 else 0)
    inside = parameters_of(plan, model) - model.outside_size
    return int(model.outside_size * model.element_bytes + inside * per_weight)


@dataclass(frozen=True)
class LayerSeconds:
    """Median seconds of one layer on one batch of text."""

    attention: float
    feed: float


@torch.no_grad()
def time_layers(
    model: StreamedModel,
    text: Calibration,
    batch: int = 1,
    rounds: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerSeconds]:
    """Measures every layer here, in one process, on the first `batch` windows of `text`, in fp32."""
    mesh = single()
    h_BSD = model.embed(text.tokens_NS[:batch])
    seconds: list[LayerSeconds] = []
    for number in range(model.shape.layers):
        layer = model.layer(number)
        attention, feed = [], []
        # The first round warms up.
        for _ in range(rounds + 1):
            start = time.perf_counter()
            a_BSD = layer.attend(h_BSD)
            middle = time.perf_counter()
            if layer.num_experts:
                x_TD = layer.norm(a_BSD).flatten(0, 1)
                moe_output(layer, x_TD, layer.route(x_TD), mesh)
            elif layer.is_dense:
                layer.dense(layer.norm(a_BSD).flatten(0, 1))
            attention.append(middle - start)
            feed.append(time.perf_counter() - middle)
        seconds.append(LayerSeconds(statistics.median(attention[1:]), statistics.median(feed[1:])))
        progress(number + 1, model.shape.layers)
    return seconds


def seconds_of(plan: DropPlan, layers: list[LayerSeconds]) -> float:
    """Of the layers that `plan` leaves. Fewer experts take as long: a token still uses top-k of them."""
    left = plan.survivors
    return sum(layers[n].attention + (layers[n].feed if n not in plan.layers else 0.0) for n in left)


def _parts(plan: DropPlan, model: StreamedModel, layer: int) -> tuple[int, int, int]:
    size = model.size(layer)
    if layer in plan.layers:
        return size.attention, 0, 0
    return size.attention, size.feed, len(plan.kept(layer)) * size.expert
