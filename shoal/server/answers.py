"""The token ids of answers given, by their text.

A client sends an answer back as text, and cutting that text into tokens again may give others than the model wrote
(llama.cpp#11970): the cached state behind it would not be found. A bounded memory of what was written solves it.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

MAX_TOKENS = 4_000_000
"""Kept in all: some 32 MB."""


class AnswerMemory:
    """Recent answers. Safe to use from many threads."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        self._lock = threading.Lock()
        self._ids: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._held = 0

    def remember(self, text: str, token_ids: Sequence[int]) -> None:
        """Keep the ids that an answer was written with; the oldest answers go when there are too many."""
        if not text or len(token_ids) > self.max_tokens:
            return
        with self._lock:
            key = _key(text)
            self._held -= len(self._ids.pop(key, ()))
            self._ids[key] = tuple(token_ids)
            self._held += len(token_ids)
            while self._held > self.max_tokens:
                self._held -= len(self._ids.popitem(last=False)[1])

    def recall(self, text: str) -> tuple[int, ...] | None:
        """The ids of an answer, if it was given here."""
        with self._lock:
            return self._ids.get(_key(text))


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
