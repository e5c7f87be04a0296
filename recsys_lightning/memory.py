"""Memory of a training process on the CPU."""

import ctypes
import os
import sys

# From malloc.h of the GNU C library.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 256 * 2**20  # bytes asked of the system at once


def keep_freed_memory() -> bool:
    """Let the allocator of the GNU C library keep what torch frees, for the next tensor.

    By default each tensor above some 32 MB is fetched from the system and given back: a training step over scores of
    (positions, items) then spends nearly half its time in page faults, filling with zeros what is written over at once.
    The price is that the process stays as large as it has ever been.

    Returns:
        Whether it was done: not where another C library is in use, nor where the environment tunes this one.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if tuned or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, _PAD)])
