"""Run directories for the Runs page: which there are, and what each has written since the page last looked.

A training run and the server share nothing but files: `metrics.jsonl` grows by whole lines, `stages.json` and
`skill-*.json` are replaced whole (`shoal.log`, `shoal.recipes.run`). So the page asks for the bytes after an offset and
gets the whole lines among them. A resumed run rewrites the file without the steps that a kill lost; the file is then
another one (its inode differs), and the page is told to begin again.

A name from a request is looked up in the listing of the runs directory and never joined to a path. A link that leads out
of the runs directory, or out of its run, leads nowhere here; so does a file that may not be read.
"""

import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Query
from fastapi.responses import Response
from starlette.exceptions import HTTPException

MAX_RUNS = 200
MAX_PIECE_BYTES = 1 << 20
MAX_FILE_BYTES = 4 << 20
MAX_SAMPLES = 200
MAX_SAMPLE_CHARACTERS = 20_000
LIVE_AFTER_WRITE_S = 120.0
"""A run that wrote less than this ago counts as going on."""

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SKILL_NAME = re.compile(r"skill-[A-Za-z0-9._-]{1,80}\.json")


@dataclass(frozen=True, kw_only=True)
class MetricsPiece:
    """What a metrics file says after an offset."""

    lines: list[dict[str, Any]]
    offset: int
    """Where to go on: the byte after the last whole line."""
    file: str
    """Which file it was; give it back with the offset."""
    restarted: bool
    """The lines begin at the start of the file: forget what was read before."""
    more: bool
    """More whole lines were there than fit into one piece."""


def runs_router(runs_dir: Path) -> APIRouter:
    """Routes below `/api/runs`.

    Args:
        runs_dir: holds run directories, or is one; nothing outside it is ever read. It may appear later.
    """
    router = APIRouter(prefix="/api/runs", include_in_schema=False)

    @router.get("")
    def runs() -> Response:
        found = [describe_run(name, path) for name, path in find_runs(runs_dir).items()]
        newest_first = sorted(found, key=lambda run: run["idle_s"])
        return _json_response({"runs": newest_first[:MAX_RUNS]})

    @router.get("/{name}")
    def run(name: str) -> Response:
        path = _run_path(runs_dir, name)
        return _json_response({**describe_run(name, path), "stages": read_stages(path)})

    @router.get("/{name}/metrics")
    def metrics(
        name: str,
        offset: Annotated[int, Query(ge=0, lt=1 << 62)] = 0,
        file: Annotated[str, Query(max_length=64)] = "",
    ) -> Response:
        path = _run_path(runs_dir, name)
        piece = read_metrics_after(path, offset, file)
        return _json_response({**vars(piece), "idle_s": describe_run(name, path)["idle_s"]})

    @router.get("/{name}/samples")
    def samples(name: str) -> Response:
        return _json_response({"groups": read_samples(_run_path(runs_dir, name))})

    return router


def find_runs(runs_dir: Path) -> dict[str, Path]:
    """Run directories by name: those in `runs_dir` that hold metrics or stages, or `runs_dir` itself if it is one."""
    try:
        root = runs_dir.resolve(strict=True)
        if _is_run(root):
            return {root.name: root} if _RUN_NAME.fullmatch(root.name) else {}
        entries = sorted(root.iterdir())
    except OSError:
        return {}
    runs = {}
    for entry in entries:
        path = _inside(root, entry)
        if path is not None and _RUN_NAME.fullmatch(entry.name) and _is_run(path):
            runs[entry.name] = path
    return runs


def describe_run(name: str, path: Path) -> dict[str, Any]:
    """Name, recipe, and for how long the run has written nothing, in seconds."""
    config = _read_json(path, "config.json")
    written = [_modified_s(path, file) for file in ("metrics.jsonl", "stages.json", "config.json")]
    idle_s = max(time.time() - max(written), 0.0)
    settings = config.get("settings")
    recipe = config.get("recipe") or (settings.get("recipe") if isinstance(settings, dict) else None)
    return {
        "name": name,
        "recipe": recipe if isinstance(recipe, str) else "",
        "idle_s": round(idle_s, 1),
        "is_live": idle_s < LIVE_AFTER_WRITE_S,
    }


def read_stages(run_dir: Path) -> list[dict[str, Any]]:
    """Stages that have ended or stopped, in the order in which they began."""
    known = ("started", "wall_s", "energy_j", "energy_kind", "done", "tokens", "result")
    stages = [
        {"name": name, **{key: facts[key] for key in known if key in facts}}
        for name, facts in _read_json(run_dir, "stages.json").items()
        if isinstance(facts, dict)
    ]
    return sorted(stages, key=lambda stage: _number(stage.get("started")))


def read_metrics_after(run_dir: Path, offset: int, file: str) -> MetricsPiece:
    """Whole lines of `metrics.jsonl` from byte `offset` on, at most `MAX_PIECE_BYTES` of them.

    Args:
        file: the `file` that came with the offset; another one, or an offset that is no line's start, begins at 0.
    """
    path = _plain_file(run_dir, "metrics.jsonl")
    if path is None:
        return MetricsPiece(lines=[], offset=0, file="", restarted=offset > 0, more=False)
    with path.open("rb") as stream:
        identity = f"{os.fstat(stream.fileno()).st_ino:x}"
        restarted = file != identity or not _is_line_start(stream, offset)
        start = 0 if restarted else offset
        stream.seek(start)
        content = stream.read(MAX_PIECE_BYTES + 1)
    more = len(content) > MAX_PIECE_BYTES
    content = content[:MAX_PIECE_BYTES]
    whole = content.rfind(b"\n") + 1
    if more and not whole:  # a line larger than a piece is nobody's metrics
        whole = _past_line(path, start) - start
    lines = [line for text in content[:whole].split(b"\n") if (line := _json_object(text)) is not None]
    return MetricsPiece(lines=lines, offset=start + whole, file=identity, restarted=restarted, more=more and whole > 0)


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """Completions in groups: the examples of each `skill-*.json`, and the last lines of `samples.jsonl` by stage.

    A line of `samples.jsonl` is `{"stage", "step", "prompt", "text", "reward"}`; all but `text` may be missing.
    """
    groups: list[dict[str, Any]] = []
    for entry in sorted(run_dir.glob("skill-*.json")):
        if _SKILL_NAME.fullmatch(entry.name):
            examples = _read_json(run_dir, entry.name).get("examples")
            found = [{"text": text} for text in examples if isinstance(text, str)] if isinstance(examples, list) else []
            groups.append({"name": entry.stem.removeprefix("skill-"), "samples": _shortened(found)})
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for line in _last_lines(run_dir, "samples.jsonl"):
        if isinstance(line.get("text"), str):
            by_stage.setdefault(str(line.get("stage") or "samples"), []).append(line)
    groups += [{"name": stage, "samples": _shortened(lines)} for stage, lines in by_stage.items()]
    return [group for group in groups if group["samples"]]


def _shortened(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = ("text", "prompt", "reward", "step", "right")
    kept = [{key: sample[key] for key in known if key in sample} for sample in samples[-MAX_SAMPLES:]]
    for sample in kept:
        for key in ("text", "prompt"):
            if key in sample:
                sample[key] = str(sample[key])[:MAX_SAMPLE_CHARACTERS]
    return kept


def _run_path(runs_dir: Path, name: str) -> Path:
    path = find_runs(runs_dir).get(name)
    if path is None:
        raise HTTPException(404, "there is no run of this name; GET /api/runs lists those there are.")
    return path


def _is_run(path: Path) -> bool:
    return path.is_dir() and any(_plain_file(path, name) for name in ("metrics.jsonl", "stages.json"))


def _inside(directory: Path, path: Path) -> Path | None:
    """`path` with links followed; None if that leads out of the directory or nowhere."""
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    return resolved if resolved.is_relative_to(directory.resolve()) else None


def _plain_file(run_dir: Path, name: str) -> Path | None:
    """A regular file of a run that may be read; a pipe would block whoever opens it."""
    path = _inside(run_dir, run_dir / name)
    return path if path is not None and path.is_file() and os.access(path, os.R_OK) else None


def _modified_s(run_dir: Path, name: str) -> float:
    path = _plain_file(run_dir, name)
    return path.stat().st_mtime if path else 0.0


def _is_line_start(stream: BinaryIO, offset: int) -> bool:
    if offset == 0:
        return True
    if offset > os.fstat(stream.fileno()).st_size:
        return False
    stream.seek(offset - 1)
    return stream.read(1) == b"\n"


def _past_line(path: Path, start: int) -> int:
    """The start of the line after the one at `start`; `start` itself while that line has no end yet."""
    with path.open("rb") as stream:
        stream.seek(start)
        while piece := stream.readline(MAX_PIECE_BYTES):
            if piece.endswith(b"\n"):
                return stream.tell()
    return start


def _json_object(text: bytes) -> dict[str, Any] | None:
    """A JSON object with null for NaN and infinities; None for anything else, also for what is nested too deeply."""
    try:
        values = _finite(json.loads(text))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _last_lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Lines from the last `MAX_PIECE_BYTES` of a file; one that is torn at the front is no JSON and falls out."""
    path = _plain_file(run_dir, name)
    if path is None:
        return []
    with path.open("rb") as stream:
        stream.seek(max(path.stat().st_size - MAX_PIECE_BYTES, 0))
        content = stream.read(MAX_PIECE_BYTES)
    return [line for text in content.split(b"\n") if (line := _json_object(text)) is not None]


def _read_json(run_dir: Path, name: str) -> dict[str, Any]:
    """A JSON object of a run; nothing where it is missing, damaged or absurdly large."""
    path = _plain_file(run_dir, name)
    if path is None or path.stat().st_size > MAX_FILE_BYTES:
        return {}
    return _json_object(path.read_bytes()) or {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, float) else 0.0


def _json_response(payload: dict[str, Any]) -> Response:
    """ASCII, because files may hold half surrogates, which UTF-8 has not."""
    return Response(json.dumps(payload, allow_nan=False), media_type="application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
