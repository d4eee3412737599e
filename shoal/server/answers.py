"""The token ids of answers given, by their text.

A client sends an answer back as text, and cutting that text into tokens again may give others than the model wrote
(llama.cpp#11970): the cached state behind it would not be found. A bounded memory of what was written solves it.
"""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

MAX_BYTES = 8 << 20
"""Kept in all: two million tokens of long answers, thirty thousand short ones."""
TOKEN_BYTES = 4
ENTRY_BYTES = 250
"""What an answer takes beside its tokens: key, array, place in the table."""


class AnswerMemory:
    """Recent answers. Safe to use from many threads."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        self._held = 0

    def remember(self, text: str, token_ids: Sequence[int]) -> None:
        """Keep the ids that an answer was written with; the oldest answers go when they take too much."""
        if not text or _size(token_ids) > self.max_bytes:
            return
        with self._lock:
            key = _key(text)
            if key in self._ids:
                self._held -= _size(self._ids.pop(key))
            self._ids[key] = array("I", token_ids)
            self._held += _size(token_ids)
            while self._held > self.max_bytes:
                self._held -= _size(self._ids.popitem(last=False)[1])

    def recall(self, text: str) -> tuple[int, ...] | None:
        """The ids of an answer, if it was given here."""
        with self._lock:
            found = self._ids.get(_key(text))
        return None if found is None else tuple(found)


def _size(token_ids: Sequence[int]) -> int:
    return ENTRY_BYTES + TOKEN_BYTES * len(token_ids)


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
