"""Memory for weights in huge pages, because a processor that streams them spends half its time looking up small ones.

A page table entry covers 4 KiB, and inside a virtual machine each miss walks two tables. Two MiB per entry doubled the
bandwidth of the machine this was written on (31 to 60 GB/s, docs/kernels.md). Linux gives such pages to anonymous memory
that asks for them (`MADV_HUGEPAGE`); elsewhere, or where they are switched off, the same memory comes in small pages.
Files mapped into memory never get them: weights are laid out here, once, when a model is loaded.
"""

import contextlib
import math
import mmap

import torch
from torch import Tensor

HUGE_BYTES = 2 << 20
REGION_BYTES = 32 << 20
"""Small tensors share regions of this size; untouched pages of one cost nothing."""
ALIGNMENT_BYTES = 64


class WeightMemory:
    """Hands out tensors from large anonymous regions. A region lives as long as a tensor of it does."""

    def __init__(self) -> None:
        self._region, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of undefined contents, aligned to a cache line."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        if self._used + num_bytes > len(self._region):
            self._region, self._used = huge_bytes(max(num_bytes, REGION_BYTES)), 0
        part = self._region[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return part.view(dtype).view(shape)


def huge_bytes(num_bytes: int) -> Tensor:
    """`num_bytes` zeros, starting at a huge page, that ask for huge pages."""
    region = mmap.mmap(
        -1, num_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # shared memory gets none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_BYTES
    return whole[start : start + num_bytes]
