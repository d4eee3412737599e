"""Units of latents on disk: they outlive the process, and several processes on a machine share them.

One file per unit, named by its key, written by a thread of its own to a temporary name, synced and renamed, so that a kill
at any moment leaves whole files only. What is read back is checked by length, key and checksum; anything wrong is a miss
and is deleted, and the request is computed as if there had been no cache. Nothing here can make a request fail: a full or
read-only disk turns the cache off for a minute and says so once.

Readers take no locks: a file is there whole or not at all. The oldest files go when the directory outgrows its bound, by
the time of their last use, which a hit refreshes at most once a minute. The bound counts the units of every model in the
directory, so that those of a model that is served no more give way too.
"""

import errno
import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shoal.log import say

MAGIC = b"SHOALKV1"
KEY_FIELD = 32
HEADER_BYTES = len(MAGIC) + 8 + KEY_FIELD + 32
QUEUE_BYTES = 256 << 20
"""Units on their way to the disk; what comes while so much waits is not written."""
SWEEP_SHARE = 0.05
"""A process sweeps when it has written this share of the bound, and makes as much room."""
SWEEP_EVERY_S = 3600.0
TOUCH_AFTER_S = 60.0
OFF_FOR_S = 60.0
STRAY_AFTER_S = 3600.0


@dataclass
class DiskStats:
    """Counters since the start."""

    hits: int = 0
    misses: int = 0
    written: int = 0
    dropped: int = 0
    """Not written because the queue was full or the cache off."""
    damaged: int = 0
    deleted: int = 0


class DiskCache:
    """The units in one directory.

    Args:
        max_bytes: the directory is kept below it, give or take a twentieth for every process that writes to it.
        max_age_s: units unused for longer are deleted.
        unit_bytes: of a unit's payload; files of another size are foreign.
    """

    def __init__(self, directory: Path, *, max_bytes: int, max_age_s: float, unit_bytes: int) -> None:
        self.root, self.directory = directory, directory / f"{unit_bytes}"
        self.max_bytes, self.max_age_s, self.unit_bytes = max_bytes, max_age_s, unit_bytes
        self.stats = DiskStats()
        self._off_until_s = 0.0
        self._queue: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
        self._most_pending = max(QUEUE_BYTES // unit_bytes, 1)
        self._swept_at_s, self._written_since = time.monotonic(), 0
        self._pending: dict[bytes, bytes] = {}
        """Units on their way to the disk: a reader may want one before it has arrived."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            self._turn_off(error)
        self._thread = threading.Thread(target=self._write_behind, name="shoal-disk-cache", daemon=True)
        self._thread.start()

    @property
    def is_off(self) -> bool:
        """Whether the disk refused lately."""
        return time.monotonic() < self._off_until_s

    def get(self, key: bytes) -> bytes | None:
        """A unit's payload, or None."""
        payload = bytearray(self.unit_bytes)
        return bytes(payload) if self.get_into(key, memoryview(payload)) else None

    def get_into(self, key: bytes, payload: memoryview) -> bool:
        """Read a unit into `payload`; False is a miss, and `payload` may then hold anything."""
        pending = self._pending.get(key)
        if pending is not None:
            payload[:] = pending
            self.stats.hits += 1
            return True
        if self.is_off:
            return False
        path = self._path(key)
        try:
            found = self._read(path, key, payload)
        except FileNotFoundError:
            found = None
        except OSError as error:
            self._turn_off(error)
            found = None
        if found is False:
            self.stats.damaged += 1
            self._delete(path)
        self.stats.hits += bool(found)
        self.stats.misses += not found
        return bool(found)

    def lacks(self, key: bytes) -> bool:
        """Whether the unit would be written if it were handed over."""
        if self.is_off or len(self._pending) >= self._most_pending:
            self.stats.dropped += 1
            return False
        return key not in self._pending and not self._path(key).exists()

    def put(self, key: bytes, payload: bytes) -> None:
        """Hand a unit to the writing thread, unless it is there, or the disk behind or off."""
        if self.lacks(key):
            self._pending[key] = payload
            self._queue.put((key, payload))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until everything handed over is on disk; False when it took too long."""
        deadline_s = time.monotonic() + timeout_s
        while self._pending and time.monotonic() < deadline_s:
            time.sleep(0.005)
        return not self._pending

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is waiting and end the thread."""
        self.flush(timeout_s)
        self._queue.put(None)
        self._thread.join(timeout_s)

    def sweep(self, share: float = 1.0) -> None:
        """Delete what is too old, what is more than `share` of the bound, and what dead processes left half-written."""
        now_s, units = time.time(), []
        for entry in self._files():
            try:
                facts = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            age_s = now_s - facts.st_mtime
            is_stray = entry.name.endswith(".tmp")
            if age_s > (STRAY_AFTER_S if is_stray else self.max_age_s):
                self._delete(Path(entry.path))
            elif not is_stray:
                units.append((facts.st_mtime, facts.st_size, entry.path))
        total = sum(size for _, size, _ in units)
        for _, size, path in sorted(units):
            if total <= self.max_bytes * share:
                return
            self._delete(Path(path))
            total -= size

    def _files(self) -> "Iterator[os.DirEntry[str]]":
        """Every unit in the directory, of whatever size."""
        for size in _entries(self.root):
            for folder in _entries(size.path) if size.name.isdigit() and size.is_dir(follow_symlinks=False) else []:
                if folder.is_dir(follow_symlinks=False):
                    yield from _entries(folder.path)

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.directory / name[:2] / name

    def _read(self, path: Path, key: bytes, payload: memoryview) -> bool:
        """True: read and right. False: damaged."""
        header = bytearray(HEADER_BYTES)
        with path.open("rb", buffering=0) as file:
            facts = os.fstat(file.fileno())
            if facts.st_size != HEADER_BYTES + self.unit_bytes or file.readinto(header) != HEADER_BYTES:
                return False
            filled = 0
            while filled < self.unit_bytes:
                count = file.readinto(payload[filled:])
                if not count:
                    return False
                filled += count
            if bytes(header) != _header(key, payload):
                return False
            if time.time() - facts.st_mtime > TOUCH_AFTER_S:
                os.utime(file.fileno())
        return True

    def _write_behind(self) -> None:
        self._sweep_quietly()
        while True:
            item = self._queue.get()
            if item is None:
                return
            key, payload = item
            if not self.is_off:
                try:
                    self._write(key, payload)
                except OSError as error:
                    self._turn_off(error)
            self._pending.pop(key, None)
            is_late = time.monotonic() - self._swept_at_s > SWEEP_EVERY_S
            if is_late or self._written_since > self.max_bytes * SWEEP_SHARE:
                self._sweep_quietly()

    def _write(self, key: bytes, payload: bytes) -> None:
        path = self._path(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_header(key, memoryview(payload)))
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            self._delete(temporary)
            raise
        self.stats.written += 1
        self._written_since += len(payload)

    def _sweep_quietly(self) -> None:
        self._swept_at_s, self._written_since = time.monotonic(), 0
        try:
            self.sweep(1 - SWEEP_SHARE)
        except OSError as error:
            self._turn_off(error)

    def _delete(self, path: Path) -> None:
        try:
            path.unlink()
            self.stats.deleted += 1
        except OSError:
            pass  # somebody else was quicker, or the directory is read-only: either way it is no loss

    def _turn_off(self, error: OSError) -> None:
        if not self.is_off:
            what = errno.errorcode.get(error.errno or 0, str(error))
            say(
                f"context cache: the disk refused ({what}, {error.filename}); off for {OFF_FOR_S:.0f} s, requests go on"
            )
        self._off_until_s = time.monotonic() + OFF_FOR_S


def _header(key: bytes, payload: memoryview) -> bytes:
    checksum = hashlib.blake2b(payload, digest_size=32, key=key[:64]).digest()
    return MAGIC + len(payload).to_bytes(8, "little") + key.ljust(KEY_FIELD, b"\0") + checksum


def _entries(directory: "str | Path | os.DirEntry[str]") -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(directory) as found:
            return list(found)
    except OSError:
        return []
