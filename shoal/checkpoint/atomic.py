"""Writing a directory whole or not at all, and knowing later that it is still what was written.

Files go into a temporary sibling, each is synced to disk, and one rename makes them visible: a kill at any moment leaves
either the old directory or the new one. SHA-256 sums of every file are kept beside them, so that a truncated or altered
file is noticed when it is read back and not three days later.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from shoal.errors import CheckpointError, DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, over quota, over the file size limit."""


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Hand out an empty directory to write into; at the end of the block it becomes `target`, replacing what was there.

    A kill while an existing `target` is being replaced leaves its old content as `<target>.old`.

    Raises:
        DiskFullError: no room; what was written is removed again, and `target` is as it was.
    """
    temporary, old = temporary_name(target), target.with_name(target.name + ".old")
    with disk_full_is_said(target):
        try:
            remove_tree(temporary)
            temporary.mkdir(parents=True)
            yield temporary
            for path in sorted(temporary.iterdir()):
                sync(path)
            sync(temporary)
            _put_in_place(temporary, target, old)
        finally:
            remove_tree(temporary)


def _put_in_place(temporary: Path, target: Path, old: Path) -> None:
    if target.exists():
        remove_tree(old)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    remove_tree(old)


def temporary_name(target: Path) -> Path:
    """Where `target` is written before it is renamed; leftovers of kills have names like this."""
    return target.with_name(f".{target.name}.writing")


@contextmanager
def disk_full_is_said(target: Path) -> Iterator[None]:
    """Turn a full disk, in Python's writer or in safetensors', into DiskFullError, and other refusals to write into
    CheckpointError."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number in _FULL:
            raise DiskFullError(
                f"no room to write {target}: {error}. Nothing half-written was left behind; "
                "free space, or choose another directory, and run the same command again."
            ) from error
        if number is None:
            raise
        raise CheckpointError(f"cannot write {target}: {error}.") from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors writes in Rust and only tells the number in its message.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def sync(path: Path) -> None:
    """Make a file's content, or a directory's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a directory of ours; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sums_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of some files of a directory, by name; several files at once, one per core."""
    ordered = sorted(names)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(ordered, threads.map(lambda name: sha256_of(directory / name), ordered)))


def check_sums(directory: Path, sums: Mapping[str, object]) -> None:
    """Compare files with their recorded sums.

    Raises:
        CheckpointError: a file is missing or differs; names it.
    """
    for name, wanted in sums.items():
        if Path(name).name != name or not isinstance(wanted, str):
            raise CheckpointError(f"{directory}: the list of checksums names {name!r}, which is no plain file name.")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing; copy it again, or use another checkpoint.")
    for name, found in sums_of(directory, sums).items():
        wanted = str(sums[name])
        if found != wanted:
            raise CheckpointError(
                f"{directory / name} is damaged or was changed: its SHA-256 is {found[:12]}..., recorded is "
                f"{wanted[:12]}...; copy it again, or use another checkpoint."
            )
