"""The contenders of the `train` benchmark and how each is started."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

import torch.distributed as dist

from ....launch.rendezvous import interface_of
from ..cases import Case, make_batch, make_weights
from ..step import TrainingStep
from .remote import Place, Remote


class Contender(Protocol):
    """A model ready to train on the batch of one case."""

    def probe(self) -> tuple[float, float]:
        """Loss and gradient norm of the first batch; leaves the weights alone."""
        ...

    def run(self) -> float:
        """Does one step and returns its seconds."""
        ...

    def close(self) -> None:
        """Releases what it holds."""
        ...


class LeftOut(Exception):  # noqa: N818 (not a failure: the report says why)
    """A contender that this installation cannot run."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the benchmark's tables."""

    name: str
    module: str
    """File of this folder that builds it."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Arguments of its `build`."""
    package: str = ""
    """Package it needs, as it is imported ..."""
    distribution: str = ""
    """... and as it is installed ..."""
    pip: str = "'wastenot[bench]'"
    """... by what pip is told."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """In which it computes what it is asked to."""
    own_process: bool = False
    """It patches the process it runs in."""
    own_runtime: bool = False
    """It steps on one rank through the same code as on several."""
    in_profile: bool = False
    """Also measured op by op."""


OURS = "wastenot"
REFERENCE = "transformers eager"
"""The plainest implementation: its loss and gradient norm are those that the others must meet."""

ENTRIES = (
    Entry(name=OURS, module="own", own_runtime=True, in_profile=True),
    Entry(
        name=REFERENCE,
        module="huggingface",
        options={"experts": "eager"},
        package="transformers",
        distribution="transformers",
        in_profile=True,
    ),
    Entry(
        name="transformers grouped_mm",
        module="huggingface",
        options={"experts": "grouped_mm"},
        package="transformers",
        distribution="transformers",
        in_profile=True,
    ),
    Entry(name="deepspeed", module="deepspeed", package="deepspeed", distribution="deepspeed"),
    Entry(
        name="megatron-core",
        module="megatron",
        package="megatron",
        distribution="megatron-core",
        own_process=True,
    ),
)


def start(entry: Entry, case: Case) -> Contender:
    """The contender with the weights and the batch of `case`. Raises LeftOut where it cannot run here."""
    check_installed(entry)
    if entry.own_process:
        return Remote(entry.module, make_step, entry, case)
    return make_step(entry, case)


def make_step(entry: Entry, case: Case) -> TrainingStep:
    """The contender, in this process."""
    model = peer_of(entry).build(case, make_weights(case), **entry.options)
    return TrainingStep(model, *make_batch(case), case.dtype)


def make_rank(entry: Entry, case: Case, place: Place) -> Contender:
    """The contender's part on this rank, in this process and for good on its core."""
    os.sched_setaffinity(0, {place.core})
    if place.world == 1 and not entry.own_runtime:
        return make_step(entry, case)
    if (interface := interface_of("127.0.0.1")) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    if place.world > 1:
        dist.init_process_group("gloo", init_method=f"file://{place.store}", rank=place.rank, world_size=place.world)
    peer = peer_of(entry)
    return peer.build_rank(case, make_weights(case), place, **entry.options)


def peer_of(entry: Entry) -> ModuleType:
    """The file that builds `entry`, imported."""
    return importlib.import_module(f".{entry.module}", __package__)


def check_installed(entry: Entry) -> None:
    """Raises LeftOut where this installation lacks what `entry` needs."""
    if entry.package and importlib.util.find_spec(entry.package) is None:
        raise LeftOut(f"{entry.distribution} is not installed: pip install {entry.pip}")
    peer = peer_of(entry)
    reason = peer.missing() if hasattr(peer, "missing") else ""
    if reason:
        raise LeftOut(reason)
