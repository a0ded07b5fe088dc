"""The contenders of the `kernels` benchmark, the MoE layer of each alone, and how each is started."""

from __future__ import annotations

from typing import Protocol

from ..layer_cases import LayerCase, make_layer_weights
from ..layer_reference import Outcome, reference
from ..layer_step import LayerStep, Pass, Probed
from . import torchtitan
from .remote import Remote
from .roster import ENTRIES, Entry, LeftOut, check_installed, peer_of

LAYERS = (
    *ENTRIES,
    Entry(
        name="torchtitan",
        module="torchtitan",
        package="torchtitan",
        distribution="torchtitan",
        pip=torchtitan.PIP,
        dtypes=("bf16",),
    ),
)


class LayerContender(Protocol):
    """A layer ready to run on the tokens of one case."""

    def probe(self) -> Probed:
        """What it computes and keeps."""
        ...

    def run(self, what: Pass, /) -> float:
        """Does one pass and returns its seconds."""
        ...

    def close(self) -> None:
        """Releases what it holds."""
        ...


def start_layer(entry: Entry, case: LayerCase, expected: Outcome) -> LayerContender:
    """The layer with the weights and the tokens of `case`. Raises LeftOut where it cannot run here."""
    if case.dtype not in entry.dtypes:
        raise LeftOut(f"{entry.name} computes in {' and '.join(entry.dtypes)} only")
    check_installed(entry)
    if entry.own_process:
        return Remote(entry.module, make_remote_layer, entry, case)
    return make_layer(entry, case, expected)


def make_layer(entry: Entry, case: LayerCase, expected: Outcome) -> LayerStep:
    """The contender, in this process."""
    layer = peer_of(entry).build_layer(case, make_layer_weights(case), **entry.options)
    return LayerStep(layer, case, expected)


def make_remote_layer(entry: Entry, case: LayerCase) -> LayerStep:
    """The contender where what is expected of it is not at hand."""
    return make_layer(entry, case, reference(case))
