"""What a run prints and what it writes: lines for people, JSON lines for programs.

`MetricsWriter` appends one JSON object a line to `metrics.jsonl`. Lines are the only channel between a run and
everything that looks at it later (report, Runs page, planner), so a run can be watched, killed and resumed freely.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print one line for a person, on standard error, so that standard output stays machine-readable."""
    console.print(message, markup=False)


def print_json(payload: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output: the last line of every verb called with `--json`."""
    sys.stdout.write(json.dumps(_finite(payload), ensure_ascii=False) + "\n")
    sys.stdout.flush()


@contextmanager
def progress_bar(title: str, total: int) -> Iterator["ProgressBar"]:
    """A bar with an ETA, and the same as plain lines every ten seconds where there is no terminal."""
    bar = ProgressBar(title, total)
    with bar:
        yield bar


class ProgressBar:
    """Counts towards `total`; shows a live bar on a terminal, otherwise a line at most every ten seconds."""

    line_interval_s = 10.0

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
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
        self.task = self.progress.add_task(title, total=total, note="")

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
            left_s = (now_s - self.started_s) / max(self.done, 1) * max(self.total - self.done, 0)
            say(f"{self.title}: {self.done}/{self.total} {note} eta {duration(left_s)}")


def duration(seconds: float) -> str:
    """`95.2` -> `1 min 35 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class MetricsWriter:
    """Appends metric lines to a JSONL file; a line is written whole or not at all.

    Args:
        path: the file, made with its directory when missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, stage: str, step: int, **values: Any) -> None:
        """Append one line: `{"stage": ..., "step": ..., "time_s": ..., **values}`; NaN and infinities become null."""
        line = {"stage": stage, "step": step, "time_s": round(time.time(), 3), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line)) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Drop lines of `stage` after `step`: they belong to work that a kill lost and a resume will do again."""
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["stage"] != stage or line["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file, in order. A torn last line (killed run) is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _finite(value: Any) -> Any:
    """JSON has no NaN: replace what is not finite by null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
