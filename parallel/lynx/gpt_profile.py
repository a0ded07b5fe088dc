"""A published profile: a GPT layer of 14 operators under tensor parallelism on a slow link (`reference/papers.md` 2.9).

Milliseconds and megabytes are as measured there. Inputs and backward reads are not in it; they are those of the
operators. Of the 42 MB after each of the two last dropouts, 28 are the residual stream and 14 the mask; the stream
after the second is the next layer's input, and counted there, so that a layer's 628 MB stay the same.
"""

from __future__ import annotations

from .problem import Backward, Kind, Layer, Operator, Window


def gpt_layer() -> Layer:
    """The layer, with two all-reduces in the forward and two in the backward."""
    return Layer(
        name="gpt",
        operators=(
            _operator("input", 0.0, 28, kind="input"),
            _operator("norm 1", 0.067, 28, "input"),
            _operator("query, key, value", 0.490, 42, "norm 1"),
            _operator("softmax", 0.377, 128, "query, key, value"),
            _operator("attention dropout", 0.286, 192, "softmax"),
            _operator("attention", 0.191, 14, "attention dropout", "query, key, value"),
            _operator("projection", 0.146, 0, "attention"),
            _operator("all-reduce 1", 2.200, 28, "projection", kind="collective"),
            _operator("dropout 1", 0.140, 42, "all-reduce 1", "input"),
            _operator("norm 2", 0.067, 28, "dropout 1"),
            _operator("linear 1", 0.512, 56, "norm 2"),
            _operator("gelu", 0.428, 56, "linear 1"),
            _operator("linear 2", 0.483, 0, "gelu"),
            _operator("all-reduce 2", 2.200, 28, "linear 2", kind="collective"),
            _operator("dropout 2", 0.075, 14, "all-reduce 2", "dropout 1"),
        ),
        forward=(_window("all-reduce 1", 2.200), _window("all-reduce 2", 2.200)),
        backward=(
            _backward("dropout 2", 0.053, "dropout 2"),
            _backward("linear 2", 0.100, "gelu"),
            _backward("gelu", 0.210, "linear 1"),
            _backward("linear 1", 0.442, "norm 2"),
            _window("all-reduce 2'", 2.231),
            _backward("norm 2", 0.222, "dropout 1"),
            _backward("dropout 1", 0.055, "dropout 1"),
            _backward("projection", 0.250, "attention"),
            _backward("attention", 0.360, "attention dropout", "query, key, value"),
            _backward("attention dropout", 0.248, "attention dropout"),
            _backward("softmax", 0.743, "softmax", "query, key, value"),
            _backward("query, key, value", 0.340, "norm 1"),
            _window("all-reduce 1'", 2.275),
            _backward("norm 1", 0.236, "input"),
        ),
    )


def _operator(name: str, ms: float, megabytes: int, *inputs: str, kind: Kind = "compute") -> Operator:
    return Operator(name=name, seconds=ms / 1e3, bytes=megabytes * 10**6, inputs=inputs, kind=kind)


def _window(name: str, ms: float) -> Window:
    return Window(name=name, seconds=ms / 1e3)


def _backward(name: str, ms: float, *reads: str) -> Backward:
    return Backward(name=name, seconds=ms / 1e3, reads=reads)
