"""Running a model's program to see what it prints, with limits. **No security boundary.**

For rewards that judge code by its output (R1 compiles and runs test cases). The program runs in a fresh interpreter, in an
empty directory of its own, with an empty environment, without site packages, with limits on time, memory and file size,
and in a network namespace without a network where the system lets an ordinary user make one. It is killed with
everything it started.

What it does *not* keep a program from: reading any file that you may read, using the CPU until its time is up, filling the
temporary directory up to its limit, exploiting the kernel. Run models you do not trust on a machine you can lose.
"""

import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal.errors import ConfigError

MAX_PROGRAM_CHARS = 100_000

Outcome = Literal["ok", "failed", "timeout", "too_long"]


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What a program may use."""

    time_s: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    """Of standard output, and of any file it writes."""

    def __post_init__(self) -> None:
        if not 0 < self.time_s <= 600 or self.memory_bytes < 64 << 20 or self.output_bytes < 1:
            raise ConfigError(
                f"sandbox limits time_s={self.time_s} (above 0, at most 600), memory_bytes={self.memory_bytes} (64 MiB or "
                f"more) and output_bytes={self.output_bytes} (1 or more) cannot be."
            )


@dataclass(frozen=True, kw_only=True)
class ProgramResult:
    """What came of a program."""

    outcome: Outcome
    output: str
    """Standard output, as far as the limit allowed."""
    error: str
    """The last line of standard error."""
    has_network: bool
    """Whether the system could not take the network away."""


def run_program(program: str, *, stdin: str = "", limits: SandboxLimits | None = None) -> ProgramResult:
    """Run a Python program; never raises for what the program does."""
    limits = limits or SandboxLimits()
    isolation = network_isolation()
    if len(program) > MAX_PROGRAM_CHARS:
        return ProgramResult(outcome="too_long", output="", error="", has_network=not isolation)
    with tempfile.TemporaryDirectory(prefix="shoal-program-") as name:
        folder = Path(name)
        (folder / "program.py").write_text(program, encoding="utf-8", errors="replace")
        (folder / "input").write_text(stdin, encoding="utf-8", errors="replace")
        with (
            (folder / "input").open("rb") as given,
            (folder / "out").open("wb") as out,
            (folder / "err").open("wb") as err,
        ):
            process = subprocess.Popen(
                [*isolation, sys.executable, "-I", "-S", "-B", "program.py"],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin"},
                stdin=given,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=_limiter(limits),
            )
            try:
                process.wait(timeout=limits.time_s)
                outcome: Outcome = "ok" if process.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                outcome = "timeout"
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output = (folder / "out").read_bytes()[: limits.output_bytes].decode(errors="replace")
        lines = (folder / "err").read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
        return ProgramResult(
            outcome=outcome, output=output, error=lines[-1][:300] if lines else "", has_network=not isolation
        )


def passed_fraction(program: str, cases: Sequence[tuple[str, str]], limits: SandboxLimits | None = None) -> float:
    """Share of the test cases (input, wanted output) that a program passes; white space at line ends does not count."""
    if not cases:
        raise ConfigError("a code reward needs at least one test case (input, wanted output).")
    passed = 0
    for given, wanted in cases:
        result = run_program(program, stdin=given, limits=limits)
        passed += result.outcome == "ok" and _lines(result.output) == _lines(wanted)
    return passed / len(cases)


@functools.cache
def network_isolation() -> tuple[str, ...]:
    """The command that starts a program without a network, all of whose processes end with it; empty where the system does not let us."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if subprocess.run([*command, "true"], capture_output=True, timeout=10, check=False).returncode == 0:
            return command
    return ()


def _limiter(limits: SandboxLimits) -> Callable[[], None]:
    def limit() -> None:
        seconds = int(limits.time_s) + 1
        for kind, most in (
            (resource.RLIMIT_AS, limits.memory_bytes),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_FSIZE, limits.output_bytes),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, 64),
        ):
            resource.setrlimit(kind, (most, most))

    return limit


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
