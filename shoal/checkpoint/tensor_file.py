"""Safetensors files read and written one tensor at a time, so that memory is bounded by a tensor and not by a file.

The library's reader maps a whole file and its writer wants every tensor at once; a converter that streams tens of
gigabytes through a few can use neither. The format itself is small: a length, a JSON header of names, dtypes, shapes and
byte ranges, then the bytes (safetensors documentation, "Format"). Here tensors are read with plain reads into fresh
memory, and the pages they came through are given back. A header is data from a stranger: every range is checked against
the shape and the size of the file before a byte is believed.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.atomic import disk_full_is_said, sync
from shoal.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
"""The bound of the reference implementation."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be, known before it exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """One file, open for reading.

    Raises:
        CheckpointError: missing, or its header does not describe its bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; copy it again from where the model came from.") from error
        try:
            self._start, self.specs, self._offset = _read_header(path, self._file)
        except Exception:
            self._file.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def tensor(self, key: str) -> Tensor:
        """A copy of one tensor; the file's pages do not stay in this process's memory."""
        spec, start = self.specs[key], self._start + self._offset[key]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if spec.num_bytes == 0:
            return tensor
        view = tensor.view(-1).view(torch.uint8).numpy().data
        self._file.seek(start)
        done = 0
        while done < spec.num_bytes:
            count = self._file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{self.path} ends inside {key}; copy it again.")
            done += count
        return tensor


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], make: Callable[[str], Tensor]) -> str:
    """Write a file whose tensors are made one after the other, in the order of `specs`; returns its SHA-256.

    Raises:
        DiskFullError: no room; the unfinished file is removed.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, spec in specs.items():
        header[key] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.writing")
    with disk_full_is_said(path):
        try:
            with temporary.open("wb") as file:
                start = struct.pack("<Q", len(text)) + text
                digest = hashlib.sha256(start)
                file.write(start)
                for key, spec in specs.items():
                    tensor = make(key).contiguous()
                    assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), key
                    content = tensor.reshape(-1).view(torch.uint8).numpy().data
                    file.write(content)
                    digest.update(content)
            sync(temporary)
            temporary.rename(path)
            _forget_pages(path)
            return digest.hexdigest()
        finally:
            temporary.unlink(missing_ok=True)


def _read_header(path: Path, file: Any) -> tuple[int, dict[str, TensorSpec], dict[str, int]]:
    """Where the bytes begin, and every tensor's spec and offset."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(f"{path} is damaged (header of {length} bytes in a file of {size}); copy it again.")
    try:
        header = json.loads(file.read(length))
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        specs, offsets = {}, {}
        for key, value in entries.items():
            specs[key] = TensorSpec(tuple(int(width) for width in value["shape"]), DTYPES[value["dtype"]])
            begin, end = value["data_offsets"]
            if min(specs[key].shape, default=0) < 0 or not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"{key} lies outside the file")
            if end - begin != specs[key].num_bytes:
                raise ValueError(f"{key} has {end - begin} bytes, its shape wants {specs[key].num_bytes}")
            offsets[key] = begin
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it again.") from error
    return 8 + length, specs, offsets


def _forget_pages(path: Path) -> None:
    """Written pages may leave the page cache: a converter's output would push out what it reads next."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
