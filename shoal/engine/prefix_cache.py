"""Which units of 64 tokens lie in RAM, found by what decides their latents.

A unit's latents depend on everything before it, so its key is a digest that chains over the identity of the model (weights,
number format, layout, rotary embedding, tokenizer, who may share it) and all tokens up to its end: equal keys, equal
latents. A retrained model has another root and finds nothing.

Units that nobody reads are given up when pages run short: the longest unused first, and never a unit before those that
come after it, since a unit without its predecessor can not be found.
"""

import hashlib
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from shoal.engine.pages import PagePool

UNIT_TOKENS = 64
KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """Everything beside the tokens that decides a unit's latents, and who may share them."""

    weights_digest: str
    dtype: str
    layout_version: int
    rope_digest: str
    tokenizer_digest: str
    isolation: str = ""

    @classmethod
    def unique(cls) -> "CacheIdentity":
        """An identity that no other engine has: for weights without a digest."""
        return cls(
            weights_digest=secrets.token_hex(16), dtype="", layout_version=0, rope_digest="", tokenizer_digest=""
        )

    @property
    def root(self) -> bytes:
        """Key before the first unit."""
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for field in fields(self):
            text = f"{field.name}={getattr(self, field.name)}".encode()
            # Length first, or two fields could run into each other.
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.digest()


def unit_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of the unit that holds these 64 tokens after the unit (or root) `previous`."""
    tokens = np.asarray(token_ids, dtype="<i4").tobytes()
    return hashlib.blake2b(previous + tokens, digest_size=KEY_BYTES).digest()


@dataclass(slots=True)
class _Unit:
    page: int
    parent: bytes | None
    children: int = 0


class PrefixCache:
    """Units in RAM. The cache holds each unit's page once; readers hold it once more."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.evicted = 0
        self._units: dict[bytes, _Unit] = {}
        """In order of last use, the longest unused first."""

    def __len__(self) -> int:
        return len(self._units)

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` could free: units that only the cache holds."""
        return self.pool.num_idle

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest run of known keys from the first on; each is held once more for the caller."""
        pages = []
        for key in keys:
            unit = self._units.get(key)
            if unit is None:
                break
            pages.append(unit.page)
        # From the last to the first, so that a chain's end counts as unused for longer than what it hangs on.
        for key in reversed(keys[: len(pages)]):
            self._units[key] = self._units.pop(key)
        self.pool.share(pages)
        return pages

    def insert(self, keys: Sequence[bytes], pages: Sequence[int], *, parent: bytes | None = None) -> None:
        """Make full units known. A key that is known already keeps its page.

        Args:
            parent: key of the unit before the first of these; None when it is the first of all.
        """
        for key, page in zip(keys, pages, strict=True):
            if key in self._units:
                self._units[key] = self._units.pop(key)
            else:
                self.pool.cache(page)
                self._units[key] = _Unit(page, parent if parent in self._units else None)
                if parent in self._units:
                    self._units[parent].children += 1
            parent = key

    def evict(self, count: int) -> int:
        """Free up to `count` pages; returns how many."""
        freed = 0
        while freed < count and self.pool.num_idle:
            leaves = (key for key, unit in self._units.items() if not unit.children and self.pool.is_idle(unit.page))
            victims = list(itertools.islice(leaves, count - freed))
            if not victims:
                break
            for key in victims:
                self._drop(key)
            freed += len(victims)
        self.evicted += freed
        return freed

    def clear(self) -> None:
        """Forget everything that nobody reads."""
        self.evict(len(self._units))

    def _drop(self, key: bytes) -> None:
        unit = self._units.pop(key)
        if unit.parent is not None and unit.parent in self._units:
            self._units[unit.parent].children -= 1
        self.pool.uncache(unit.page)
