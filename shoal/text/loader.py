"""Batches from shards, for ever, resumable to the sample.

Two modes. "pack" puts whole short documents together in rows (synthetic problems, chats); "stream" cuts long texts into
windows of consecutive tokens, which may begin and end inside a document. In both, documents in a row are hidden from each
other. Each epoch has its own order, drawn from (seed, epoch), so the loader's place is two numbers; its state also names
what they depend on, and is refused where that differs.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from shoal.errors import CheckpointError, DataError
from shoal.text.packing import Batch, batch_of_documents, batch_of_windows, pack_documents
from shoal.text.shards import Shards

Mode = Literal["pack", "stream"]


class Loader:
    """An endless iterator of `Batch`.

    Args:
        batch_rows: rows per batch.
        row_tokens: tokens per row.
        mode: "pack" or "stream", see the module docstring.
        pad_token: fills what packing leaves over.
    Raises:
        DataError: the corpus is too small for one batch, or a document too long for a row.
    """

    def __init__(
        self, shards: Shards, *, batch_rows: int, row_tokens: int, seed: int, mode: Mode, pad_token: int = 0
    ) -> None:
        self.shards, self.batch_rows, self.row_tokens = shards, batch_rows, row_tokens
        self.seed, self.mode, self.pad_token = seed, mode, pad_token
        self.epoch, self.batch_in_epoch = 0, 0
        self._rows = self._plan(0)
        if len(self._rows) < batch_rows:
            raise DataError(
                f"the corpus fills {len(self._rows)} rows of {row_tokens} tokens, a batch needs {batch_rows}; use more text or smaller batches."
            )

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if (self.batch_in_epoch + 1) * self.batch_rows > len(self._rows):
                self.epoch, self.batch_in_epoch = self.epoch + 1, 0
                self._rows = self._plan(self.epoch)
            start = self.batch_in_epoch * self.batch_rows
            rows = self._rows[start : start + self.batch_rows]
            self.batch_in_epoch += 1
            yield _batch(self.shards, rows, self.row_tokens, self.pad_token)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch will come from, and what that depends on."""
        return {"epoch": self.epoch, "batch_in_epoch": self.batch_in_epoch, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        States of earlier versions, which hold the place alone, are taken at their word.

        Raises:
            CheckpointError: the state is damaged, or of a loader that would give other batches.
        """
        own = self._identity()
        differing = [
            f"{name}={state[name]!r}, here {own[name]!r}" for name in own if state.get(name, own[name]) != own[name]
        ]
        if differing:
            raise CheckpointError(
                f"the checkpoint's place in the data is that of another loader: {'; '.join(differing)}. "
                "Resume with the same data and settings, or start a new run."
            )
        epoch, batch = state.get("epoch"), state.get("batch_in_epoch")
        if not (isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 and batch >= 0):
            raise CheckpointError(
                f"the checkpoint's place in the data is damaged: epoch={epoch!r}, batch_in_epoch={batch!r} must be whole "
                "numbers of at least 0. Resume from another checkpoint."
            )
        rows = self._plan(epoch)
        if batch * self.batch_rows > len(rows):
            raise CheckpointError(
                f"the checkpoint's place in the data is batch {batch} of {len(rows) // self.batch_rows} in epoch {epoch}; "
                "resume with the data it was made with."
            )
        self.epoch, self.batch_in_epoch, self._rows = epoch, batch, rows

    def _identity(self) -> dict[str, Any]:
        """What decides which batches come."""
        return {
            "seed": self.seed,
            "mode": self.mode,
            "batch_rows": self.batch_rows,
            "row_tokens": self.row_tokens,
            "dataset_sha256": self.shards.digest,
        }

    def _plan(self, epoch: int) -> list[Any]:
        """The rows of an epoch: lists of documents, or window starts."""
        if self.mode == "pack":
            return plan_packed(self.shards, self.row_tokens, self.seed + 7919 * epoch)
        generator = np.random.default_rng([self.seed, epoch])
        phase = int(generator.integers(self.row_tokens)) if self.shards.num_tokens > 2 * self.row_tokens else 0
        starts = np.arange(phase, self.shards.num_tokens - self.row_tokens, self.row_tokens)
        return [int(start) for start in generator.permutation(starts)]


def plan_packed(shards: Shards, row_tokens: int, seed: int) -> list[Any]:
    """Rows of document numbers, in shuffled order."""
    rows = pack_documents(shards.document_lengths().tolist(), row_tokens, seed)
    order = np.random.default_rng([seed, 1]).permutation(len(rows))
    return [rows[index] for index in order]


def evaluation_batches(
    shards: Shards, *, batch_rows: int, row_tokens: int, mode: Mode, pad_token: int = 0
) -> Iterator[Batch]:
    """Every token once, in a fixed order; the last batch may be smaller."""
    if mode == "pack":
        rows: list[Any] = pack_documents(shards.document_lengths().tolist(), row_tokens, seed=0)
    else:
        rows = list(range(0, shards.num_tokens - row_tokens, row_tokens))
    for start in range(0, len(rows), batch_rows):
        yield _batch(shards, rows[start : start + batch_rows], row_tokens, pad_token)
    if mode == "stream":
        rest = shards.num_tokens - 1 - len(rows) * row_tokens
        if rest > 0:
            yield _windows(shards, [len(rows) * row_tokens], rest)


def _batch(shards: Shards, rows: list[Any], row_tokens: int, pad_token: int) -> Batch:
    if isinstance(rows[0], int):
        return _windows(shards, rows, row_tokens)
    members = [number for row in rows for number in row]
    documents = [shards.document(number) for number in members]
    place = iter(range(len(members)))
    return batch_of_documents(documents, [[next(place) for _ in row] for row in rows], row_tokens, pad_token)


def _windows(shards: Shards, starts: list[int], row_tokens: int) -> Batch:
    return batch_of_windows([shards.window(start, start + row_tokens + 1) for start in starts])
