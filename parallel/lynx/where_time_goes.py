"""Where each rank's time goes in a simulated step: compute, what is exposed, and waits by their cause."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .schedule import BACKWARD, FORWARD, INPUT
from .simulate import Simulation

Seconds = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Seconds of every rank, [ranks]. All but the `hidden_` ones add up to the step's.

    A wait is one whether recomputation runs in it or not, and so is communication that a pass stands still for.
    """

    compute: Seconds
    """Of forwards and backwards."""
    recompute: Seconds
    """Recomputation that nothing hides."""
    communication: Seconds
    """That passes stand still for."""
    reduce: Seconds
    """Gradient reduction after the rank's last pass."""
    optimizer: Seconds
    warm_up: Seconds
    """Waits before the rank's first backward."""
    steady: Seconds
    """Waits from there to its last forward."""
    cool_down: Seconds
    """Waits after both, for other ranks at the end of the step too."""
    hidden_recompute: Seconds
    """Under communication or waits."""
    hidden_communication: Seconds
    """Of passes, beside compute."""

    @property
    def bubble(self) -> Seconds:
        """All waits."""
        return self.warm_up + self.steady + self.cool_down

    @property
    def total(self) -> Seconds:
        """The step, as often as there are ranks."""
        return sum(
            (getattr(self, field.name) for field in fields(self) if not field.name.startswith("hidden_")),
            np.zeros_like(self.compute),
        )


def rank_times(simulation: Simulation) -> RankTimes:
    """Where the time of each rank of `simulation` goes."""
    schedule, of_pass, parts = simulation.schedule, simulation.passes, simulation.passes.parts
    steps = np.arange(schedule.kinds.shape[1])
    waited = simulation.start.copy()
    waited[:, 1:] -= simulation.end[:, :-1]
    waited[of_pass.second] = 0.0
    early = _early(simulation)
    hidden = hidden_early(early, simulation.start, simulation.arrival)
    waited += hidden
    backward = (schedule.kinds == BACKWARD) | (schedule.kinds == INPUT)
    first_backward = backward.argmax(axis=1)[:, None]
    last_forward = np.where(schedule.kinds == FORWARD, steps, -1).max(axis=1)[:, None]
    before = steps <= first_backward
    after = ~before & (steps > last_forward)
    last, begin, end = simulation.end[:, -1], simulation.optimizer[:, 0], simulation.optimizer[:, 1]
    reduce = np.clip(simulation.reduce[:, :, 1].max(axis=1) - last, 0.0, None)
    communication, exposed = of_pass.total_of(parts.communication), of_pass.total_of(parts.exposed)
    return RankTimes(
        compute=of_pass.total_of(parts.compute),
        recompute=of_pass.total_of(parts.recompute) + (early - hidden).sum(axis=1),
        communication=exposed,
        reduce=reduce,
        optimizer=end - begin,
        warm_up=np.where(before, waited, 0.0).sum(axis=1),
        steady=np.where(before | after, 0.0, waited).sum(axis=1),
        cool_down=np.where(after, waited, 0.0).sum(axis=1) + (begin - last - reduce) + (simulation.seconds - end),
        hidden_recompute=of_pass.total_of(parts.hidden) + hidden.sum(axis=1),
        hidden_communication=communication - exposed,
    )


def _early(simulation: Simulation) -> Seconds:
    """Recomputation ahead of its gradient, of each action."""
    of_pass = simulation.passes
    if not of_pass.parts.early.any():
        # Spares an array of every action a look-up.
        return np.zeros((1, 1))
    return np.where(of_pass.there & ~of_pass.second, of_pass.parts.early[of_pass.codes], 0.0)


def hidden_early(early: Seconds, start: Seconds, arrival: Seconds) -> Seconds:
    """The part of `early` recomputation, from `start` on, that ran before the gradient's `arrival`."""
    return np.clip(arrival - start, 0.0, early)
