"""The process in which a user's task runs: it is told what to do in JSON lines and answers in JSON lines.

Started by `verifier_pool` as `python -m shoal.rl.verifier_worker`, in a session of its own, with limits on memory and core
files. What the task prints goes to standard error, so that it cannot be mistaken for an answer. The pool keeps the time
and kills what is too slow; here only what the task raises is caught.

A task is a module with

    problems(seed)            an iterable, possibly endless, of mappings with "prompt" and "answer"
    verify(problem, answer)   True, False or a score from 0 to 1; ValueError for an answer that cannot be read

and perhaps `rewards` (a mapping from name to weight, of functions in TRL's signature in the same module), `brute_force`
(problem -> all right answers), `exploits` (answers that must score 0) and `configure(**options)`.
"""

import asyncio
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

MAX_DETAIL_CHARACTERS = 300


class Task:
    """A loaded task module, and its generators so far."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.streams: dict[int, tuple[int, Iterator[Any]]] = {}
        """By seed: how many problems were taken, and the rest."""

    def about(self) -> dict[str, Any]:
        """What the trainer may know of the module."""
        rewards = getattr(self.module, "rewards", {})
        if not isinstance(rewards, Mapping):
            raise TypeError("rewards must be a mapping from the name of a function to its weight")
        missing = [name for name in rewards if not callable(getattr(self.module, str(name), None))]
        if missing:
            raise TypeError(f"rewards names {missing}, which are no functions of the task")
        return {
            "name": str(getattr(self.module, "name", "") or self.module.__name__),
            "description": (inspect.getdoc(self.module) or "").split("\n")[0],
            "has_problems": callable(getattr(self.module, "problems", None)),
            "has_verify": callable(getattr(self.module, "verify", None)),
            "has_brute_force": callable(getattr(self.module, "brute_force", None)),
            "rewards": {str(name): float(weight) for name, weight in rewards.items()},
            "exploits": [str(text) for text in getattr(self.module, "exploits", ())],
        }

    def problems(self, seed: int, start: int, count: int) -> dict[str, Any]:
        """Problems `start` to `start + count` of the stream `problems(seed)`; fewer at its end."""
        place, stream = self.streams.get(seed, (0, None))
        if stream is None or place != start:  # another worker went on, or this one is new
            stream = itertools.islice(iter(self.module.problems(seed)), start, None)
        found = list(itertools.islice(stream, count))
        self.streams[seed] = (start + len(found), stream)
        return {"problems": found, "ended": len(found) < count}

    def verify(self, problem: Mapping[str, Any], answer: str) -> dict[str, Any]:
        """A score, or why there is none."""
        try:
            value = self.module.verify(problem, answer)
        except ValueError as error:
            return {"score": 0.0, "failure": "unparsed", "detail": _short(error)}
        if isinstance(value, bool | int | float) and 0 <= value <= 1:
            return {"score": float(value)}
        return {"failure": "bad_score", "detail": f"verify returned {value!r}"[:MAX_DETAIL_CHARACTERS]}

    def brute_force(self, problem: Mapping[str, Any]) -> dict[str, Any]:
        """All right answers, by the task's own slow way."""
        return {"answers": [str(answer) for answer in self.module.brute_force(problem)]}

    def reward(self, name: str, arguments: list[Any], columns: dict[str, Any]) -> dict[str, Any]:
        """Values of one reward function of the task."""
        values = getattr(self.module, name)(*arguments, **columns)
        if inspect.isawaitable(values):
            values = asyncio.run(_awaited(values))
        return {"values": list(values)}


def main() -> None:
    """Serve until the pool closes standard input."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory_bytes = int(sys.argv[1])
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[2])
    try:
        task = Task(_load(spec))
        hello: dict[str, Any] = {"about": task.about()}
    except BaseException as error:  # the pool tells the user; SystemExit in a task file must not pass for a clean end
        _send(replies, {"failure": "load", "detail": f"{type(error).__name__}: {_short(error)}"})
        return
    _send(replies, hello)
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "problems": task.problems,
        "verify": task.verify,
        "brute_force": task.brute_force,
        "reward": task.reward,
    }
    for line in sys.stdin.buffer:
        _send(replies, _answer(actions, json.loads(line)))


def _answer(actions: Mapping[str, Callable[..., dict[str, Any]]], message: list[Any]) -> dict[str, Any]:
    timeout_s, action, *arguments = message
    # The pool kills what is too slow; should the pool itself be gone, the default action of this signal does.
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 5)
    try:
        return actions[action](*arguments)
    except MemoryError:
        return {"failure": "memory", "detail": "the memory limit was reached"}
    except RecursionError as error:
        return {"failure": "raised", "detail": f"RecursionError: {_short(error)}"}
    except (Exception, SystemExit) as error:
        return {"failure": "raised", "detail": f"{type(error).__name__}: {_short(error)}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _load(spec: Mapping[str, Any]) -> ModuleType:
    if "path" in spec:
        path = Path(spec["path"])
        sys.path.insert(0, str(path.parent))
        found = importlib.util.spec_from_file_location(path.stem, path)
        if found is None or found.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(found)
        sys.modules[path.stem] = module
        found.loader.exec_module(module)
    else:
        module = importlib.import_module(str(spec["module"]))
    if spec.get("options"):
        module.configure(**spec["options"])
    return module


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    try:
        line = json.dumps(message)
    except (TypeError, ValueError, RecursionError) as error:
        line = json.dumps({"failure": "raised", "detail": f"what the task returned is no JSON: {_short(error)}"})
    replies.write(line.encode() + b"\n")
    replies.flush()


async def _awaited(value: Any) -> Any:
    return await value


def _short(error: BaseException) -> str:
    return str(error)[:MAX_DETAIL_CHARACTERS]


if __name__ == "__main__":
    main()
