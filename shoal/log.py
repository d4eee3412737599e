"""What a run prints and what it writes: lines for people, JSON lines for programs.

`MetricsWriter` appends one JSON object a line to `metrics.jsonl`. Lines are the only channel between a run and
everything that looks at it later (report, Runs page, planner), so a run can be watched, killed and resumed freely.
A line is appended in one piece; what a kill or a full disk tore off is removed before the next line goes in, so that one
torn line never spoils its neighbour.
"""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shoal.errors import ConfigError, DataError, DiskFullError, ShoalError

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print one line for a person, on standard error, so that standard output stays machine-readable."""
    console.print(message, markup=False)


def print_json(payload: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output: the last line of every verb called with `--json`."""
    sys.stdout.write(json.dumps(_finite(payload), ensure_ascii=False) + "\n")
    sys.stdout.flush()


@contextmanager
def progress_bar(title: str, total: int, *, done: int = 0) -> Iterator["ProgressBar"]:
    """A bar with an ETA, and the same as plain lines every ten seconds where there is no terminal.

    Args:
        done: steps that an earlier run did: they fill the bar and do not count for the ETA.
    """
    bar = ProgressBar(title, total, done=done)
    with bar:
        yield bar


class ProgressBar:
    """Counts towards `total`; shows a live bar on a terminal, otherwise a line at most every ten seconds."""

    line_interval_s = 10.0

    def __init__(self, title: str, total: int, *, done: int = 0) -> None:
        self.title, self.total, self.done, self.first = title, total, done, done
        self.started_s = self.last_line_s = time.monotonic()
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressBar":
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.progress.stop()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move by `steps`; `note` is a short status such as `loss 1.72`."""
        self.done += steps
        self.progress.update(self.task, completed=self.done, note=note)
        now_s = time.monotonic()
        if not self.live and now_s - self.last_line_s >= self.line_interval_s:
            self.last_line_s = now_s
            per_step_s = (now_s - self.started_s) / max(self.done - self.first, 1)
            left_s = per_step_s * max(self.total - self.done, 0)
            say(f"{self.title}: {self.done}/{self.total} {note} eta {duration(left_s)}")


def duration(seconds: float) -> str:
    """`95.2` -> `1 min 35 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class MetricsWriter:
    """Appends metric lines to a JSONL file; a line is written whole or not at all.

    Args:
        path: the file, made with its directory when missing; a torn last line in it is cut off.
    Raises:
        ConfigError: the directory cannot be made or written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _write_errors_are_said(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _cut_torn_line(path)

    def write(self, stage: str, step: int, **values: Any) -> None:
        """Append one line: `{"stage": ..., "step": ..., "time_s": ..., **values}`; NaN and infinities become null.

        Raises:
            DiskFullError: no room; the file is as it was before.
        """
        line = {"stage": stage, "step": step, "time_s": round(time.time(), 3), **values}
        content = (json.dumps(_finite(line)) + "\n").encode()
        with _write_errors_are_said(self.path), self.path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(size)
                raise

    def rewind(self, stage: str, step: int) -> None:
        """Drop lines of `stage` after `step`: they belong to work that a kill lost and a resume will do again."""
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line.get("stage") != stage or line.get("step", 0) <= step]
        temporary = self.path.with_name(f".{self.path.name}.writing")
        with _write_errors_are_said(self.path):
            try:
                with temporary.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in kept)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file, in order. A torn last line (killed run) is left out.

    Raises:
        DataError: there is no such file.
    """
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}. Give the directory of a run that has started.") from error
    lines = []
    for text in content.split("\n"):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


@contextmanager
def _write_errors_are_said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _as_users_error(path, error) from error


def _as_users_error(path: Path, error: OSError) -> ShoalError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(
            f"no room to write {path}: {error}. Nothing half-written was left behind; free space and run the same "
            "command again."
        )
    return ConfigError(f"cannot write {path}: {error}. Choose another run directory, or make this one writable.")


def _finite(value: Any) -> Any:
    """JSON has no NaN: replace what is not finite by null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
