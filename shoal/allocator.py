"""The C allocator, set for programs that take and free the same large arrays again and again, as training does.

glibc gives large blocks back to the system at once and takes them anew, page by page, each page cleared; and it asks for
pages of 4 KiB, of which a processor remembers too few. `keep_memory` lets it keep what is freed, and reserves room for its
heap in huge pages: address space only, which costs memory where it is used. On other systems it does nothing.
"""

import ctypes
import os
import sys

LARGEST_BLOCK_BYTES = 2**31 - 1
"""Blocks up to this size come from the heap (the largest number that mallopt takes)."""
RESERVED_BYTES = 2**31 - (128 << 20)
"""Heap that is huge pages from the start: less than what is given back when it is free at the top."""
HUGE_BYTES = 2 << 20

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MADV_HUGEPAGE = 14  # sys/mman.h


def keep_memory() -> None:
    """Keep freed memory, in huge pages where the system has them. Call once, before large arrays are made."""
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_MMAP_THRESHOLD, LARGEST_BLOCK_BYTES)
    libc.mallopt(_TRIM_THRESHOLD, LARGEST_BLOCK_BYTES)
    libc.mallopt(_TOP_PAD, 64 << 20)
    _reserve(libc)


def _reserve(libc: ctypes.CDLL) -> None:
    """Let the heap grow once, ask for huge pages there, and free the block: its addresses stay with the heap."""
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = libc.free.argtypes = [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(RESERVED_BYTES)
    if not block:
        return
    start = -(-block // HUGE_BYTES) * HUGE_BYTES
    libc.madvise(start, (block + RESERVED_BYTES - start) // HUGE_BYTES * HUGE_BYTES, _MADV_HUGEPAGE)
    libc.free(block)
