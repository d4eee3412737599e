"""Worker processes that judge answers, and are killed when they take too long or too much.

A user's task is the user's own code, and the scorers of math-verify and reasoning-gym evaluate text: neither belongs into
the process that trains. Each worker (`verifier_worker.py`) loads the task once and is asked one thing at a time. A worker
that does not answer in time is killed with everything it started, and replaced; so is one that dies. Nothing that goes
wrong becomes a zero: the answer has no score and its failure is counted by kind.

A worker gets no more of the environment than it needs to run Python. That keeps secrets out of an honest task's logs; it is
no security boundary: the task runs as the same user and may read what that user may read.
"""

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError, TaskError
from shoal.rl.grading import Grade
from shoal.rl.rewards import Reward
from shoal.rl.tasks.task import Problem

MAX_REPLY_BYTES = 64 << 20
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "TZ")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Limits of the workers."""

    workers: int = 2
    timeout_s: float = 2.0
    """For one answer, or one reward call divided by its answers."""
    start_timeout_s: float = 60.0
    """For loading the task, imports included."""
    memory_bytes: int = 4 << 30
    """Address space of one worker; 0 sets no limit."""

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 256:
            raise ConfigError(f"verifier workers={self.workers} must be between 1 and 256.")
        if not (self.timeout_s > 0 and self.start_timeout_s > 0):
            raise ConfigError(
                f"timeout_s={self.timeout_s} and start_timeout_s={self.start_timeout_s} must be positive."
            )
        if self.memory_bytes < 0 or 0 < self.memory_bytes < 64 << 20:
            raise ConfigError(f"memory_bytes={self.memory_bytes} must be 0 (no limit) or at least 64 MiB.")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a worker loads: a file of the user's, or one of our adapters by module name."""

    path: Path | None = None
    module: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """As the worker reads it."""
        where = {"path": str(self.path)} if self.path else {"module": self.module}
        return json.dumps({**where, "options": self.options})


class VerifierPool:
    """A `grading.Verifier` over worker processes; close it, or use it as a context.

    Raises:
        TaskError: the task cannot be loaded; the message holds what it raised.
    """

    def __init__(self, spec: TaskSpec, config: PoolConfig | None = None) -> None:
        self.spec, self.config = spec, config or PoolConfig()
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._every: list[_Worker] = []
        self._threads = ThreadPoolExecutor(self.config.workers, thread_name_prefix="verifier")
        self._closed = threading.Event()
        try:
            started = list(self._threads.map(lambda _: _Worker(spec, self.config), range(self.config.workers)))
            for worker in started:
                self._every.append(worker)
                self._workers.put(worker)
            self.about: dict[str, Any] = list(map(_Worker.start, started))[-1]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every worker."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._every:
            worker.kill()

    def verify(self, problems: Sequence[Problem], answers: Sequence[str]) -> tuple[list[Grade], float]:
        """Grades in order, by as many workers as there are; and the slowest, in seconds."""
        replies = list(self._threads.map(self._verify_one, problems, answers))
        return [grade for grade, _ in replies], max((wall_s for _, wall_s in replies), default=0.0)

    def problems(self, seed: int, start: int, count: int) -> tuple[list[Any], bool]:
        """Problems `start` to `start + count` of the task's stream `seed`, and whether it ended among them.

        Raises:
            TaskError: the task raised, or yields something that is no problem.
        """
        with self._worker() as worker:
            reply, _ = worker.ask(["problems", seed, start, count], self.config.start_timeout_s)
        if "failure" in reply:
            raise TaskError(f"the task's problems() failed ({reply['failure']}): {reply.get('detail', '')}")
        return reply["problems"], bool(reply["ended"])

    def brute_force(self, problem: Problem) -> list[str] | None:
        """All right answers as the task's `brute_force` finds them; None where it fails."""
        with self._worker() as worker:
            reply, _ = worker.ask(["brute_force", as_mapping(problem)], self.config.start_timeout_s)
        return reply.get("answers")

    def reward(self, name: str) -> Reward:
        """One of the task's own reward functions, called in a worker."""

        def reward(
            prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any
        ) -> list[float | None]:
            sent = {key: value for key, value in columns.items() if key != "problem"}
            message = ["reward", name, [list(prompts), list(completions), [list(ids) for ids in completion_ids]], sent]
            with self._worker() as worker:
                reply, _ = worker.ask(message, self.config.timeout_s * max(len(completions), 1))
            if "failure" in reply:
                raise TaskError(f"in its worker: {reply['failure']}, {reply.get('detail', '')}")
            return list(reply["values"])

        reward.__name__ = name
        return reward

    def _verify_one(self, problem: Problem, answer: str) -> tuple[Grade, float]:
        with self._worker() as worker:
            reply, wall_s = worker.ask(["verify", as_mapping(problem), answer], self.config.timeout_s)
        score = reply.get("score")
        return Grade(score=score, failure=reply.get("failure"), detail=str(reply.get("detail", ""))), wall_s

    @contextlib.contextmanager
    def _worker(self) -> Iterator["_Worker"]:
        if self._closed.is_set():
            raise TaskError("the verifier pool is closed.")
        worker = self._workers.get()
        try:
            yield worker
        finally:
            self._workers.put(worker)


def as_mapping(problem: Problem) -> dict[str, Any]:
    """A problem as its task wrote it."""
    return {**problem.facts, "prompt": problem.prompt, "answer": problem.answer}


class _Worker:
    """One process, replaced when it is lost."""

    def __init__(self, spec: TaskSpec, config: PoolConfig) -> None:
        self.spec, self.config = spec, config
        self.about: dict[str, Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None
        self._buffer = b""

    def start(self) -> dict[str, Any]:
        """Start the process and wait until the task is loaded."""
        if self._process is not None and self.about is not None:
            return self.about
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        command = [sys.executable, "-m", "shoal.rl.verifier_worker", str(self.config.memory_bytes), self.spec.to_json()]
        self._buffer = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
            start_new_session=True,
        )
        reply, failure = self._read(self.config.start_timeout_s)
        if reply is None or "about" not in reply:
            detail = reply["detail"] if reply else f"{failure}: {self._last_error()}"
            self.kill()
            name = self.spec.path or self.spec.module
            raise TaskError(f"the task {name} cannot be loaded: {detail or 'no reason given'}")
        self.about = dict(reply["about"])
        return self.about

    def ask(self, message: list[Any], timeout_s: float) -> tuple[dict[str, Any], float]:
        """The reply, or `{"failure": kind}`, and how long it took in seconds."""
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None
        started_s = time.perf_counter()
        try:
            process.stdin.write(json.dumps([timeout_s, *message]).encode() + b"\n")
            process.stdin.flush()  # cannot block for long: between two questions a worker only reads
            reply, failure = self._read(timeout_s)
        except BrokenPipeError:
            reply, failure = None, "crash"
        wall_s = time.perf_counter() - started_s
        if reply is not None:
            return reply, wall_s
        failure = "timeout" if wall_s >= timeout_s else failure
        detail = f"no answer within {timeout_s:g} s" if failure == "timeout" else self._last_error()
        self.kill()
        return {"failure": failure, "detail": detail}, wall_s

    def kill(self) -> None:
        """End the process and all it started."""
        process, self._process = self._process, None
        if process is None:
            return
        _kill(process)
        process.wait()
        for stream in (process.stdin, process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _read(self, timeout_s: float) -> tuple[dict[str, Any] | None, str]:
        """One line from the worker, or why there is none."""
        assert self._process is not None and self._process.stdout is not None
        deadline_s = time.perf_counter() + timeout_s
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if len(self._buffer) > MAX_REPLY_BYTES:
                    return None, "memory"
                if not selector.select(max(deadline_s - time.perf_counter(), 0)):
                    return None, "timeout"
                piece = os.read(descriptor, 1 << 16)
                if not piece:
                    return None, "crash"
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = json.loads(line)
        return (reply, "") if isinstance(reply, dict) else (None, "crash")

    def _last_error(self) -> str:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.5)
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(self._errors.tell() - 2000, 0))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        code = self._process.returncode if self._process else None
        return (lines[-1][:300] if lines else "the worker died silently") + (f" (exit {code})" if code else "")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """What Python needs to run and find this package, and single-threaded arithmetic beside a trainer."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    package_root = str(Path(__file__).resolve().parents[2])
    return {**kept, "PYTHONPATH": package_root, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
