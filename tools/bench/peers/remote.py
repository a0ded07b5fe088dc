"""A contender in processes of its own, one or a rank each, run one round at a time over pipes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch

from ..machine import use_the_machine

_PRELOADED = ["torch", "torch.distributed", "transformers.models.mixtral.modeling_mixtral"]
"""What most ranks import: done once, by the process that they are forked from."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs and whom it meets."""

    rank: int
    world: int
    core: int
    """The only one that the process runs on, gloo's threads included."""
    store: str
    """File over which the ranks find each other."""


class Worker:
    """A process that builds `make(*arguments)` and then does what it is told; idle in between."""

    def __init__(
        self,
        name: str,
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        threads: int,
        method: Literal["spawn", "forkserver"] = "spawn",
    ) -> None:
        """`make` is a function of a module, and `arguments` can be pickled; its first answer is to have been built."""
        context: Any = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, make, arguments, threads), name=f"bench-{name}", daemon=True
        )
        self.process.start()
        theirs.close()

    def tell(self, method: str, *arguments: Any) -> None:
        """Calls a method of the contender there."""
        self.pipe.send((method, arguments))

    def hear(self) -> Any:
        """What the contender answers. Raises RuntimeError where it failed or its process is gone."""
        try:
            answer, error = self.pipe.recv()
        except EOFError:
            self.process.join(timeout=10)
            raise RuntimeError(f"{self.process.name} ended with exit code {self.process.exitcode}") from None
        if error:
            raise RuntimeError(f"{self.process.name} failed:\n{error}")
        return answer

    def close(self, patience_s: float = 10) -> None:
        """Ends the process, which has `patience_s` to do so itself."""
        self.pipe.close()
        self.process.join(timeout=patience_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Remote:
    """The contender that `make(*arguments)` builds, in another process that has all cores."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        """Raises RuntimeError where `make` fails."""
        self.worker = Worker(name, make, arguments, torch.get_num_threads())
        self._answer()

    def probe(self) -> Any:
        """What the contender's `probe` answers there."""
        return self._ask("probe")

    def run(self, *arguments: Any) -> float:
        """Does one round there and returns its seconds, measured there."""
        return self._ask("run", *arguments)

    def close(self) -> None:
        """Ends the process."""
        self.worker.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        self.worker.tell(method, *arguments)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.worker.hear()
        except RuntimeError:
            self.close()
            raise


class Ranks:
    """The contender that `make(*arguments, place)` builds on each of several cores, one thread each."""

    def __init__(
        self, name: str, make: Callable[..., Any], *arguments: Any, cores: Sequence[int], together: bool = True
    ) -> None:
        """`together`: as ranks of one world; else each a world of its own, for which nobody has to wait.

        Raises RuntimeError where `make` fails on one of them.
        """
        self.folder = tempfile.TemporaryDirectory(prefix="bench-ranks-")
        multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
        self.workers: list[Worker] = []
        for number, core in enumerate(cores):
            rank, world = (number, len(cores)) if together else (0, 1)
            place = Place(rank, world, core, str(Path(self.folder.name) / "store"))
            self.workers.append(Worker(f"{name}-{number}", make, (*arguments, place), 1, "forkserver"))
        self._answers()

    def probe(self) -> Any:
        """What `probe` answers on the first rank."""
        return self._ask("probe")[0]

    def run(self) -> float:
        """Does one round on all ranks at once and returns the seconds of the slowest."""
        return max(self._ask("run"))

    def close(self) -> None:
        """Ends the processes."""
        self._end(10)

    def _ask(self, method: str) -> list[Any]:
        for worker in self.workers:
            worker.tell(method)
        return self._answers()

    def _answers(self) -> list[Any]:
        """Everyone's, in order of rank. The first that fails is the one that is heard: the others wait for it."""
        answers: dict[int, Any] = {}
        waiting = {worker.pipe: number for number, worker in enumerate(self.workers)}
        try:
            while waiting:
                for pipe in wait(list(waiting)):
                    number = waiting.pop(pipe)  # pyright: ignore[reportArgumentType]
                    answers[number] = self.workers[number].hear()
        except RuntimeError:
            self._end(0)
            raise
        return [answers[number] for number in range(len(self.workers))]

    def _end(self, patience_s: float) -> None:
        for worker in self.workers:
            worker.close(patience_s)
        self.folder.cleanup()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> None:
    # The parent's standard output belongs to the report.
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # about CUDA libraries that a CPU does not have
    use_the_machine(threads)
    try:
        contender = make(*arguments)
        pipe.send((None, ""))
        while True:
            method, more = pipe.recv()
            pipe.send((getattr(contender, method)(*more), ""))
    except EOFError:
        pass
    except Exception:
        pipe.send((None, traceback.format_exc()))
