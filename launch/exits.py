"""How a command ends: 0, 2 for bad input, 1 for our fault with a log of it, 130 for Ctrl-C. Torch-free."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from .errors import UserError

OK, OUR_FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def guarded(
    work: Callable[[], int], *, as_json: bool = False, run_dir: Callable[[], Path | None] = lambda: None
) -> int:
    """Runs `work` and returns the exit code; what it raises becomes one clear message on stderr.

    `as_json` also prints {"error": message} on stdout. `run_dir` is asked, after a failure that is not the
    user's, for the folder in which the log with the traceback belongs; None puts it among temporary files.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except UserError as error:
        return _report(str(error), BAD_INPUT, as_json)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED, as_json)
    except BrokenPipeError:
        # The reader left (`| head`). Python would flush stdout once more at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUR_FAULT
    except Exception as error:
        log = write_log(error, run_dir())
        what = next(iter(str(error).splitlines()), "")
        return _report(f"{type(error).__name__}: {what} (details in {log})", OUR_FAULT, as_json)


def write_log(error: BaseException, folder: Path | None) -> Path:
    """Writes the traceback of `error` into `folder`, or among temporary files where that cannot be written."""
    text = "".join(traceback.format_exception(error))
    if folder is not None:
        log = folder / f"error-{os.getpid()}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            log.write_text(text, encoding="utf-8")
            return log
        except OSError:
            pass
    with tempfile.NamedTemporaryFile("w", prefix="wastenot-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(text)
    return Path(file.name)


def _report(message: str, code: int, as_json: bool) -> int:
    print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({"error": message}), flush=True)
    return code
