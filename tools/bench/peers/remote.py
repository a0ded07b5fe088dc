"""A contender in a process of its own, run one round at a time over a pipe."""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..machine import use_the_machine


class Remote:
    """The contender that `make(*arguments)` builds, in another process; idle between rounds."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        """`make` is a function of a module, and `arguments` can be pickled. Raises RuntimeError where it fails."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve,
            args=(theirs, make, arguments, torch.get_num_threads()),
            name=f"bench-{name}",
            daemon=True,
        )
        self.process.start()
        theirs.close()
        self._answer()

    def probe(self) -> Any:
        """What the contender's `probe` answers there."""
        return self._ask("probe")

    def run(self, *arguments: Any) -> float:
        """Does one round there and returns its seconds, measured there."""
        return self._ask("run", *arguments)

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _ask(self, method: str, *arguments: Any) -> Any:
        self.pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer, error = self.pipe.recv()
        except EOFError:
            self.process.join(timeout=10)
            raise RuntimeError(f"{self.process.name} ended with exit code {self.process.exitcode}") from None
        if error:
            self.close()
            raise RuntimeError(f"{self.process.name} failed:\n{error}")
        return answer


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
