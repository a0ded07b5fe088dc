"""Keeps freed memory in the process: large tensors are then reused instead of mapped and zeroed page by page."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc to serve large blocks from the heap and never to trim it; False where there is no glibc.

    A training step frees and allocates the same sizes again and again. Left alone, glibc maps every block above
    32 MiB anew, and the page faults cost several times the arithmetic of, say, a cross-entropy.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _MOST))
