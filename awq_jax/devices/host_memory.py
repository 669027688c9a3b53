"""Freed memory that the C library (glibc) keeps, given back to the system; with other libraries nothing happens."""

import ctypes

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # mallopt(3)


def trim() -> None:
    """Give freed memory back to the system."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is not None:
        function(0)


def return_arrays_at_once() -> None:
    """From now on: map every array of 16 MB or more by itself, so that freeing it gives it back.

    By default glibc raises the limit to the size of what was freed, and keeps up to eight arenas for each
    core. It is a setting of the whole process, so for programs rather than libraries to choose.
    """
    function = getattr(ctypes.CDLL(None), "mallopt", None)
    if function is not None:
        function(_MMAP_THRESHOLD, 1 << 24)
        function(_ARENA_MAX, 2)
