"""Where computed context is found again: units in RAM first, then on disk; and where new units are offered to both.

A unit is 64 positions of every layer of the latent pool. It is known by a key that chains over everything that decides
its numbers (`prefix_cache.py`), so whoever finds it may read on from there as if it had computed it.

Numbers that are not finite are never offered: a request that fails must not spoil those that come after it.
"""

import torch
from torch import Tensor

from shoal.engine.disk_cache import DiskCache
from shoal.engine.prefix_cache import UNIT_TOKENS, PrefixCache, unit_key
from shoal.engine.scheduler import Found, Sequence
from shoal.quant.latent import entries_are_finite

LOAD_BYTES = 64 << 20
"""Read from disk per step at most, so that a long cached prompt does not hold up its neighbours."""


class ContextCache:
    """The units of one pool.

    Args:
        pool_LPTW: `[layers, pages, 64, latent + rotary]`, or of bytes (`quant/latent.py`).
        latent: width of a latent.
    """

    def __init__(self, prefix: PrefixCache, pool_LPTW: Tensor, latent: int) -> None:
        self.prefix, self.pages, self.pool_LPTW, self.latent = prefix, prefix.pool, pool_LPTW, latent
        self.disk: DiskCache | None = None
        self.spoilt = 0
        """Units not offered because they held numbers that are not finite."""
        self._unit = torch.empty_like(pool_LPTW[:, 0])
        self._payload = memoryview(self._unit.view(torch.uint8).numpy().data).cast("B")

    @property
    def unit_bytes(self) -> int:
        return self._unit.nbytes

    def look_up(self, sequence: Sequence) -> Found:
        """The sequence's next units out of RAM, then from disk; its last token is always computed anew."""
        have = len(sequence.pages)
        keys = keys_up_to(sequence, (len(sequence.token_ids) - 1) // UNIT_TOKENS)
        pages = self.prefix.match(keys[have:])
        if self.disk is None:
            return Found(pages)
        room = max(LOAD_BYTES // self.unit_bytes, 1)
        for index in range(have + len(pages), len(keys)):
            if room == 0:
                return Found(pages, is_more=True)
            page = self._load(keys[index], keys[index - 1] if index else None)
            if page is None:
                break
            pages.append(page)
            room -= 1
        return Found(pages)

    def offer(self, sequence: Sequence) -> None:
        """Make the sequence's units that became full known to RAM and disk."""
        full = sequence.computed // UNIT_TOKENS
        if full <= sequence.cached_units:
            return
        known = keys_up_to(sequence, full)
        for index in range(sequence.cached_units, full):
            page = sequence.pages[index]
            if not self._is_finite(page):
                self.spoilt += 1
                break
            self.prefix.insert([known[index]], [page], parent=known[index - 1] if index else None)
            if self.disk is not None and self.disk.lacks(known[index]):
                self.disk.put(known[index], self._copy(page))
        sequence.cached_units = full

    def _load(self, key: bytes, parent: bytes | None) -> int | None:
        """A page filled from disk and known to the prefix cache; None when disk has not got it or RAM no room."""
        assert self.disk is not None
        if not self.disk.get_into(key, self._payload):
            return None
        if self.pages.num_free == 0:
            self.prefix.evict(1)
        if self.pages.num_free == 0:
            return None
        (page,) = self.pages.allocate(1)
        self.pool_LPTW[:, page] = self._unit
        self.prefix.insert([key], [page], parent=parent)
        return page

    def _is_finite(self, page: int) -> bool:
        entries_LTW = self.pool_LPTW[:, page]
        if entries_LTW.dtype == torch.uint8:
            return entries_are_finite(entries_LTW, self.latent)
        return bool(entries_LTW.isfinite().all())

    def _copy(self, page: int) -> bytes:
        return self.pool_LPTW[:, page].contiguous().view(torch.uint8).numpy().tobytes()


def keys_up_to(sequence: Sequence, num_units: int) -> list[bytes]:
    """Keys of a sequence's first full units, each made once."""
    keys = sequence.unit_keys
    while len(keys) < num_units:
        unit = sequence.token_ids[len(keys) * UNIT_TOKENS : (len(keys) + 1) * UNIT_TOKENS]
        keys.append(unit_key(keys[-1] if keys else sequence.cache_root, unit))
    return keys[:num_units]
