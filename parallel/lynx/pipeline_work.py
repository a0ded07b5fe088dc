"""What a simulation of one pipeline is given: seconds and bytes of every chunk of the model on every rank.

Of one replica: data-, tensor- and expert-parallel replicas do the same at the same time, so what their collectives
take (the slowest's) is part of these numbers, and how many there are is none of the simulation's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Message:
    """What a chunk sends to its neighbour, beside compute: a link each way, one message at a time on each."""

    seconds: float = 0.0
    bytes: int = 0
    """Held by the sender while it is under way, by the receiver until it is read."""


@dataclass(frozen=True, kw_only=True)
class ChunkWork:
    """One chunk of the model on one rank; per micro-batch, but for the reduction."""

    forward_seconds: float
    """Compute of the forward."""
    input_seconds: float
    """Compute of the backward for the gradient of the input; all of it, where the weights' is not known apart."""
    weight_seconds: float = 0.0
    """Compute of the backward for the gradients of the weights."""

    forward_exposed_seconds: float = 0.0
    """Communication that the forward stands still for; beside another micro-batch's pass it runs under its compute."""
    backward_exposed_seconds: float = 0.0
    """Likewise of the backward, in its part for the gradient of the input."""
    forward_beside_seconds: float = 0.0
    """Communication that runs beside the forward's own compute."""
    backward_beside_seconds: float = 0.0

    recompute_seconds: float = 0.0
    """Recomputation inside the backward that nothing hides."""
    early_recompute_seconds: float = 0.0
    """Recomputation just before the backward, without waiting for its gradient: hidden as far as a stall goes."""
    forward_hidden_seconds: float = 0.0
    """Recomputation for an earlier micro-batch under the forward's exposed communication."""
    backward_hidden_seconds: float = 0.0
    """Recomputation under the backward's exposed communication."""

    activation_bytes: int = 0
    """Kept from the start of the forward to the end of the backward."""
    weight_bytes: int | None = None
    """How many of those the weights' gradients still need once the input's is there; None: all."""
    forward_bytes: int = 0
    """Beside them while a forward runs."""
    early_bytes: int = 0
    """Recomputed under a forward for the backward just after it: from that forward's start to that backward's end."""
    backward_bytes: int = 0
    """Beside all these while a backward runs, of a split one its part for the gradient of the input."""

    output: Message = Message()
    """To the next stage."""
    gradient: Message = Message()
    """Of the input, to the stage before."""

    reduce_seconds: float = 0.0
    """Of the chunk's gradients over data-parallel replicas, once per step."""
    reduce_tail_seconds: float = 0.0
    """The part of it for gradients that are there only when the chunk's last backward ends."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                raise ValueError(f"{field.name}: {value}; use a finite number, 0 or more")
        for way in ("forward", "backward"):
            hidden, exposed = (getattr(self, f"{way}_{what}_seconds") for what in ("hidden", "exposed"))
            # Sums of the same windows, in another order.
            if hidden > exposed * (1 + 1e-9):
                raise ValueError(f"{way}_hidden_seconds: {hidden} under {exposed} of communication; use at most that")
        if self.weight_bytes is not None and self.weight_bytes > self.activation_bytes:
            raise ValueError(
                f"weight_bytes: {self.weight_bytes} of {self.activation_bytes} activation_bytes; use fewer"
            )
        if self.reduce_tail_seconds > self.reduce_seconds:
            raise ValueError(
                f"reduce_tail_seconds: {self.reduce_tail_seconds} of {self.reduce_seconds} reduce_seconds; use fewer"
            )


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """One rank of the pipeline."""

    chunks: tuple[ChunkWork, ...]
    """In the order of the model."""
    static_bytes: int = 0
    """Beside activations: parameters, gradients, optimizer state, buffers, context."""
    optimizer_seconds: float = 0.0
    """Of its step."""


@dataclass(frozen=True, kw_only=True)
class PipelineWork:
    """All ranks of one pipeline."""

    ranks: tuple[RankWork, ...]
    pair_speed: float = 1.0
    """rho: of compute under another micro-batch's communication, as a part of its speed alone; (0, 1]."""
    reduce_beside_backward: bool = True
    """Whether gradients are reduced as a chunk's last backward makes them, or after it."""
    optimizer_waits_for_all: bool = True
    """Whether an optimizer step needs the gradients of every rank, as clipping by their norm does."""

    def __post_init__(self) -> None:
        if not 0 < self.pair_speed <= 1:
            raise ValueError(f"pair_speed: {self.pair_speed}; use more than 0, at most 1")
