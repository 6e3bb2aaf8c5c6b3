"""Memory that a training step frees stays with the process until training ends."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["kept_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # malloc.h
#: what glibc comes to by itself once large buffers have been freed; its number of mappings is fixed
USUAL = {TRIM_THRESHOLD: 64 * 2**20, MMAP_THRESHOLD: 32 * 2**20, MMAP_MAX: 65_536}

_lock = threading.Lock()
_inside = 0  #: blocks under way


@contextmanager
def kept_memory() -> Iterator[None]:
    """On glibc, what the main thread frees inside is used again and not given back; elsewhere nothing changes.

    glibc hands large buffers back to the system, and gets them anew page by page, each of them zeroed: a step that
    makes and frees the same tensors as the one before spends up to a sixth of its time so (FiBiNET, docs/ranking.md).
    The price is peak memory, between -10 and +28 % in training, most where large tensors change their size from step
    to step. The policy is that of the whole process; the end of the outermost block gives back what is free. Set one
    of glibc's own variables (`MALLOC_…`, `GLIBC_TUNABLES`) to any value, and it is left alone.
    """
    libc = _glibc()
    if libc is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        yield
        return
    _count(1, libc)
    try:
        yield
    finally:
        _count(-1, libc)


def _count(change: int, libc: Any) -> None:
    """One block more or less; the first begins the policy and the last one ends it."""
    global _inside
    with _lock:
        _inside += change
        if _inside == 1 and change == 1:
            libc.mallopt(MMAP_MAX, 0)
            libc.mallopt(TRIM_THRESHOLD, -1)
        elif _inside == 0:
            for name, value in USUAL.items():
                libc.mallopt(name, value)
            libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library of this process if it is glibc, else None."""
    try:
        library = ctypes.CDLL(None)
        return library if all(hasattr(library, n) for n in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
    except (OSError, TypeError):  # Windows has no library without a name
        return None
