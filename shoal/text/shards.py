"""Token shards: a corpus as memory-mapped files that can be checked and never lie half-written.

A directory holds `shard-NNNNN.tokens` (little-endian uint16, or uint32 for large vocabularies), `.offsets` (uint64, where
each document begins, plus the end), optionally `.labels` (uint8, 1 where a token counts in the loss), and `index.json`
with sizes, SHA-256 sums, and the digest of the tokenizer that made them. The index is written last: a directory without
one is an unfinished preparation.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from shoal.errors import DataError, DiskFullError, ShoalError

FORMAT_VERSION = 1
INDEX = "index.json"

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a directory of shards holds."""

    num_tokens: int
    num_documents: int
    directory: Path


@dataclass(frozen=True, kw_only=True)
class Window:
    """Consecutive tokens of a corpus, across the borders of documents and shards."""

    tokens: NDArray[np.int64]
    counts: NDArray[np.bool_]
    """Where a token counts in the loss."""
    documents: NDArray[np.int64]
    """Number in the corpus of the document that each token is part of."""


class ShardWriter:
    """Writes documents to shards. Call `close` at the end; without it nothing can be opened.

    Raises:
        DataError, DiskFullError: the directory cannot be written to.
    """

    def __init__(
        self, directory: Path, *, vocab_size: int, tokenizer_digest: str, shard_tokens: int = 64_000_000
    ) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / INDEX).unlink(missing_ok=True)
        except OSError as error:
            raise _refusal(directory, error, 0) from error
        self.directory, self.vocab_size, self.digest, self.shard_tokens = (
            directory,
            vocab_size,
            tokenizer_digest,
            shard_tokens,
        )
        self.dtype = np.dtype("<u2" if vocab_size <= 0x10000 else "<u4")
        self._tokens: list[NDArray[Any]] = []
        self._labels: list[NDArray[np.uint8]] = []
        self._lengths: list[int] = []
        self._masked, self._pending = False, 0
        self._shards: list[dict[str, Any]] = []
        self._written: list[Path] = []
        self._has_failed = False

    def add(self, token_ids: Sequence[int] | NDArray[np.integer], loss_mask: Sequence[bool] | None = None) -> None:
        """Append one document; `loss_mask` is True where a token counts in the loss."""
        self._refuse_after_failure()
        ids = np.asarray(token_ids)
        if len(ids) == 0:
            return
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise DataError(f"token ids must be in 0..{self.vocab_size - 1}; got {int(ids.min())}..{int(ids.max())}.")
        if loss_mask is not None and len(loss_mask) != len(ids):
            raise DataError(
                f"a loss mask of {len(loss_mask)} entries was given for {len(ids)} tokens; give one entry per token."
            )
        self._tokens.append(ids.astype(self.dtype))
        self._labels.append(np.ones(len(ids), np.uint8) if loss_mask is None else np.asarray(loss_mask, dtype=np.uint8))
        self._masked |= loss_mask is not None
        self._lengths.append(len(ids))
        self._pending += len(ids)
        if self._pending >= self.shard_tokens:
            self._flush()

    def close(self) -> ShardIndex:
        """Write what is left and the index.

        Raises:
            DataError: no document was added.
            DiskFullError: no room; like after any other failure, none of the corpus is left behind.
        """
        self._refuse_after_failure()
        self._flush()
        if not self._shards:
            raise DataError("the corpus gave no tokens; check that its files contain text.")
        index = {
            "format": FORMAT_VERSION,
            "dtype": self.dtype.str,
            "vocab_size": self.vocab_size,
            "tokenizer_sha256": self.digest,
            "num_tokens": sum(shard["num_tokens"] for shard in self._shards),
            "num_documents": sum(shard["num_documents"] for shard in self._shards),
            "shards": self._shards,
        }
        self._write(INDEX, json.dumps(index, indent=1).encode())
        return ShardIndex(
            num_tokens=index["num_tokens"], num_documents=index["num_documents"], directory=self.directory
        )

    def _flush(self) -> None:
        if not self._lengths:
            return
        name = f"shard-{len(self._shards):05d}"
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype("<u8")
        parts = {".tokens": np.concatenate(self._tokens).tobytes(), ".offsets": offsets.tobytes()}
        if self._masked:
            parts[".labels"] = np.concatenate(self._labels).tobytes()
        files = {}
        for suffix, data in parts.items():
            self._write(name + suffix, data)
            files[name + suffix] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._shards.append(
            {"name": name, "num_tokens": int(offsets[-1]), "num_documents": len(self._lengths), "files": files}
        )
        self._tokens, self._labels, self._lengths, self._pending = [], [], [], 0

    def _write(self, name: str, data: bytes) -> None:
        """Write a file; on failure remove what was written before, which without its index is of no use."""
        try:
            _write(self.directory / name, data)
        except BaseException:
            self._has_failed = True
            for path in self._written:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        self._written.append(self.directory / name)

    def _refuse_after_failure(self) -> None:
        if self._has_failed:
            raise DataError(f"writing to {self.directory} failed before; begin again with a new ShardWriter.")


class Shards:
    """An opened corpus; documents are read by number, tokens stay on disk until touched."""

    def __init__(self, index: dict[str, Any], directory: Path) -> None:
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_digest: str = index["tokenizer_sha256"]
        self.num_tokens: int = index["num_tokens"]
        self.num_documents: int = index["num_documents"]
        dtype = np.dtype(index["dtype"])
        self._tokens: list[NDArray[Any]] = []
        self._labels: list[NDArray[np.uint8] | None] = []
        self._offsets: list[NDArray[np.int64]] = []
        for name, files in _checked_shards(index, directory / INDEX):
            tokens = _mapped(directory / f"{name}.tokens", dtype)
            labels = _mapped(directory / f"{name}.labels", np.uint8) if f"{name}.labels" in files else None
            offsets = _mapped(directory / f"{name}.offsets", "<u8").astype(np.int64)
            fits = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) > 0).all()
            if not fits or (labels is not None and len(labels) != len(tokens)):
                raise DataError(f"the files of {directory / name} do not fit each other; prepare the shards again.")
            self._tokens.append(tokens)
            self._labels.append(labels)
            self._offsets.append(offsets)
        sums = [facts["sha256"] for shard in index["shards"] for _, facts in sorted(shard["files"].items())]
        self.digest = hashlib.sha256(" ".join(sums).encode()).hexdigest()
        """Of all documents with their borders and labels, in order."""
        self._first_document = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        self._first_token = np.cumsum([0, *(len(tokens) for tokens in self._tokens)])
        self._document_starts = np.concatenate(
            [offsets[:-1] + first for offsets, first in zip(self._offsets, self._first_token[:-1], strict=True)]
        )

    @classmethod
    def open(cls, directory: Path, *, expected_digest: str | None = None, verify: bool = True) -> "Shards":
        """Open and check a directory of shards.

        Raises:
            DataError: missing, unfinished, truncated or changed files, or shards of another tokenizer.
        """
        path = directory / INDEX
        if not path.is_file():
            raise DataError(
                f"no {INDEX} in {directory}: the shards are missing or their preparation did not finish; prepare them again."
            )
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{path} is damaged ({error}); prepare the shards again.") from error
        shards = _checked_shards(index, path)
        if expected_digest is not None and index["tokenizer_sha256"] != expected_digest:
            raise DataError(
                f"{directory} was made with another tokenizer; prepare the shards again with the one in use."
            )
        for _, files in shards:
            for name, facts in files.items():
                _check_file(directory / name, facts, verify)
        return cls(index, directory)

    def document(self, number: int) -> tuple[NDArray[np.integer], NDArray[np.bool_] | None]:
        """Token ids of a document, and where they count in the loss (None: everywhere)."""
        shard = int(np.searchsorted(self._first_document, number, side="right")) - 1
        offsets = self._offsets[shard]
        local = number - int(self._first_document[shard])
        here = slice(int(offsets[local]), int(offsets[local + 1]))
        labels = self._labels[shard]
        return self._tokens[shard][here], None if labels is None else labels[here].astype(bool)

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of every document."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def window(self, start: int, stop: int) -> "Window":
        """Consecutive tokens `start` to `stop` of the whole corpus; only they are read, whatever shards they lie in."""
        first = int(np.searchsorted(self._first_token, start, side="right")) - 1
        last = int(np.searchsorted(self._first_token, stop, side="left"))
        tokens, counts = [], []
        for shard in range(first, last):
            begin = int(self._first_token[shard])
            here = slice(max(0, start - begin), stop - begin)
            labels = self._labels[shard]
            tokens.append(self._tokens[shard][here].astype(np.int64))
            counts.append(np.ones(len(tokens[-1]), np.bool_) if labels is None else labels[here].astype(np.bool_))
        number = np.searchsorted(self._document_starts, np.arange(start, stop), side="right") - 1
        return Window(tokens=np.concatenate(tokens), counts=np.concatenate(counts), documents=number)


def _checked_shards(index: Any, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and files of every shard, from an index that is whole and names nothing outside its directory."""
    try:
        version, dtype, shards = index["format"], index["dtype"], index["shards"]
        is_whole = all(isinstance(index[name], int) for name in ("vocab_size", "num_tokens", "num_documents"))
        is_whole &= dtype in ("<u2", "<u4") and isinstance(index["tokenizer_sha256"], str)
        named = [(shard["name"], shard["files"]) for shard in shards]
        facts = [entry for _, files in named for entry in files.values()]
        is_whole &= all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in facts)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the shards again.") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path.parent} has shard format {version}, this version reads {FORMAT_VERSION}; prepare the shards again."
        )
    if not is_whole or not named:
        raise DataError(f"{path} is damaged (a value of the wrong kind, or no shards); prepare the shards again.")
    for name, files in named:
        for file in [name, *files]:
            if not PLAIN_NAME.fullmatch(str(file)):
                raise DataError(
                    f"{path} names {file!r}, which is no plain file name; do not use shards from this source."
                )
        needed, known = {f"{name}.tokens", f"{name}.offsets"}, {f"{name}.labels"}
        if not needed <= set(files) <= needed | known:
            raise DataError(
                f"{path} is damaged: shard {name} lists {', '.join(files)}; needed are {', '.join(sorted(needed))}. "
                "Prepare the shards again."
            )
    return named


def _mapped(path: Path, dtype: DTypeLike) -> NDArray[Any]:
    try:
        return np.memmap(path, dtype, "r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); prepare the shards again.") from error


def _check_file(path: Path, facts: dict[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; prepare the shards again.")
    if path.stat().st_size != facts["bytes"]:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes instead of {facts['bytes']}; it was cut off, prepare the shards again."
        )
    if verify:
        with path.open("rb") as file:
            found = (
                hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else hashlib.sha256(file.read()).hexdigest()
            )
        if found != facts["sha256"]:
            raise DataError(f"{path} does not match its checksum; it was changed or damaged, prepare the shards again.")


def _write(path: Path, data: bytes) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _refusal(path, error, len(data)) from error
        raise


NO_ROOM = {
    errno.ENOSPC: "no room on the disk; free some space",
    errno.EDQUOT: "your disk quota is used up; free some space or have it raised",
    errno.EFBIG: "the file system or a limit allows no file this large; use another disk or smaller shards",
}

NO_ACCESS = {
    errno.EROFS: "the disk is read-only; use another directory",
    errno.EACCES: "there is no permission to write there; use another directory",
    errno.EPERM: "there is no permission to write there; use another directory",
    errno.EIO: "the disk fails (input/output error); check it or use another one",
}


def _refusal(path: Path, error: OSError, num_bytes: int) -> ShoalError:
    """What a failed write means for the user."""
    what = f"cannot write {path} ({num_bytes} bytes)"
    number = error.errno or 0
    if number in NO_ROOM:
        return DiskFullError(f"{what}: {NO_ROOM[number]} and run again.")
    return DataError(
        f"{what}: {NO_ACCESS.get(number, f'{error.strerror or error}; use another directory')} and run again."
    )
