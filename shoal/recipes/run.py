"""A run directory: what was configured, how each stage went, and a lock so that one machine does one run at a time.

`config.json` says everything that decides the outcome, `stages.json` how long each stage took and what it used,
`metrics.jsonl` what happened step by step. Stages that have finished are skipped when the same command runs again.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.checkpoint.store import check_same_config
from shoal.device import describe_machine
from shoal.errors import CheckpointError, ConfigError
from shoal.kernels.array_pool import pool_arrays
from shoal.log import duration, say
from shoal.planner.energy import EnergyMeter


class Run:
    """A run directory that is open for work.

    Args:
        directory: made when missing.
        config: everything that decides the outcome, as JSON values; resuming demands the same.
    Raises:
        CheckpointError: the directory belongs to another configuration.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "config.json"
        wanted = json.loads(json.dumps(dict(config)))
        if path.exists():
            saved = _read(path)
            check_same_config(saved.get("settings", {}), wanted)
        else:
            facts = {"machine": asdict(describe_machine()), "commit": current_commit(), "started": time.time()}
            write_json(path, {**facts, "settings": wanted, **wanted})
        self.stages: dict[str, Any] = _read(directory / "stages.json") if (directory / "stages.json").exists() else {}

    def is_done(self, stage: str) -> bool:
        """Whether a stage has finished in this or an earlier process."""
        return bool(self.stages.get(stage, {}).get("done"))

    @contextlib.contextmanager
    def stage(self, name: str, title: str, estimate_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Time a stage and meter its energy. What the body puts into the yielded dict is kept with them."""
        about = f" (about {duration(estimate_s)})" if estimate_s else ""
        say(f"[{name}] {title}{about}")
        earlier = self.stages.get(name, {})
        facts: dict[str, Any] = {}
        started_s = time.monotonic()
        finished = False
        meter = EnergyMeter()
        try:
            with meter:
                yield facts
            finished = True
        finally:
            wall_s = time.monotonic() - started_s + earlier.get("wall_s", 0.0)
            reading = meter.reading()
            used_j = (reading.joules or 0.0) + earlier.get("energy_j", 0.0)
            record = {"wall_s": wall_s, "energy_j": used_j, "energy_kind": reading.kind, "done": finished, **facts}
            self.stages[name] = {"started": earlier.get("started", time.time() - wall_s), **record}
            write_json(self.directory / "stages.json", self.stages)
            if finished:
                result = facts.get("result")
                say(f"[{name}] done in {duration(wall_s)}" + (f": {result}" if result else ""))


@contextlib.contextmanager
def only_run() -> Iterator[None]:
    """Hold the machine-wide lock: two runs on the same cores make each other up to forty times slower. Arrays are pooled.

    Raises:
        ConfigError: another run holds it.
    """
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")
    path = runtime / f"shoal-{os.getuid()}.lock"
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                "another shoal run is training on this machine; wait for it, or stop it first."
            ) from error
        pool_arrays()
        yield


def current_commit() -> str | None:
    """The commit of the checkout this package runs from, with "+changes" when the tree differs; None outside git."""
    here = Path(__file__).resolve().parents[2]
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(directory), *arguments], check=True, capture_output=True, text=True, timeout=10
    )
    return done.stdout.strip()


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); choose another run directory or remove this one."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object; choose another run directory or remove this one.")
    return values
