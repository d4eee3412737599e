"""Documents from files: plain text, JSON lines (also gzipped), Parquet, or folders of them."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import DataError

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")


def read_documents(paths: Sequence[Path], *, text_key: str = "text") -> Iterator[str]:
    """Every document of the files and folders, in sorted order; empty ones are left out.

    Args:
        text_key: the field that holds the text in JSON lines and Parquet.
    Raises:
        DataError: a file that is missing, not UTF-8, malformed or without that field; no text in any of them.
    """
    found = False
    for path in paths:
        for file in _files(path):
            for text in _read(file, text_key):
                if text.strip():
                    found = True
                    yield text
    if not found:
        raise DataError(
            f"no text in {', '.join(str(path) for path in paths)}; the corpus must hold at least one non-empty document."
        )


def split_text(text: str, held_out_fraction: float) -> tuple[str, str]:
    """The text cut in two: what to train on, and its last part, held out."""
    if not 0 < held_out_fraction < 1:
        raise DataError(f"held_out_fraction={held_out_fraction} must be between 0 and 1.")
    cut = int(len(text) * (1 - held_out_fraction))
    if cut == 0 or cut == len(text):
        raise DataError(f"a text of {len(text)} characters is too short to hold out a fraction of {held_out_fraction}.")
    return text[:cut], text[cut:]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file.")
        return files
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a file or folder of {', '.join(SUFFIXES)}.")
    return [path]


def _read(path: Path, text_key: str) -> Iterator[str]:
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path, text_key)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        for where, value in read_json_lines(path):
            yield _text_of(value, where, text_key)
    else:
        yield _decode(path.read_bytes(), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The value of every line that is not empty, with where it stands, for messages. `.gz` files are unpacked on the way.

    Raises:
        DataError: a file that is missing, no whole gzip file, not UTF-8, or a line that is no JSON.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a file with one JSON object a line.")
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _value_of_line(line, f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({error}); fetch it again.") from error


def _value_of_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(line, where))
    except (json.JSONDecodeError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{where}: not JSON ({what}); every line must be one JSON object.") from error


def _text_of(value: Any, where: str, text_key: str) -> str:
    text = value.get(text_key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        seen = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{where}: no text under {text_key!r}; the line has {seen}. Name the right field with --text-key."
        )
    return text


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: install the extra 'data' (pip install shoal[data]).") from error
    try:
        table = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own errors share no narrower base
        raise DataError(f"{path} is no readable Parquet file ({error}); fetch it again.") from error
    if text_key not in table.schema_arrow.names:
        raise DataError(
            f"{path}: no column {text_key!r}; it has {', '.join(table.schema_arrow.names)}. Name the right one with --text-key."
        )
    for batch in table.iter_batches(columns=[text_key]):
        yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; convert the file to UTF-8 first.") from error
