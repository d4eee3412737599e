"""Where problems come from, by what stands behind `--task`: a family's name, a Python file, a dataset, or an adapter.

    chain_sum            a built-in family (`tasks/`), asked in this process
    my_task.py           the user's own file, loaded in worker processes only (`verifier_worker.py` says what it holds)
    jsonl:data.jsonl     a dataset in GSM8K's layout (`tasks/jsonl.py`); numbers are compared exactly
    math:data.jsonl      the same, judged by math-verify in worker processes
    gym:NAME             a reasoning-gym family, generated and judged in worker processes

Whatever the source, problems fall into three disjoint sets by the hash of their key: what a base may read ("pretrain"),
what reinforcement learning asks ("rl"), and what is held out ("eval").
"""

import contextlib
import hashlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from shoal.errors import TaskError, did_you_mean
from shoal.rl.grading import FamilyVerifier, Grade, Verifier
from shoal.rl.rewards import WeightedReward
from shoal.rl.tasks import TASKS
from shoal.rl.tasks.jsonl import is_same_answer, read_problems
from shoal.rl.tasks.splits import problems as family_problems
from shoal.rl.tasks.splits import split_of
from shoal.rl.tasks.task import Problem, Task
from shoal.rl.verifier_pool import PoolConfig, TaskSpec, VerifierPool

DRAWN_AT_ONCE = 256
MAX_PROBLEM_CHARS = 100_000
MAX_REPEATS = 2000
"""After so many problems in a row that were all seen before, a task counts as having no more."""


class ProblemSets(Protocol):
    """Problems by set."""

    def problems(self, split: str, count: int) -> list[Problem]:
        """Up to `count` different problems of "pretrain", "rl" or "eval", the same every time."""


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """A task ready to be asked and to judge."""

    name: str
    description: str
    sets: ProblemSets
    verifier: Verifier
    identity: dict[str, Any]
    """What decides which problems there are, as JSON values."""
    rewards: tuple[WeightedReward, ...] = ()
    """The task's own, instead of accuracy and format."""
    family: Task | None = None
    """The built-in family, where it is one."""
    pool: VerifierPool | None = None
    exploits: tuple[str, ...] = field(default=())

    def worked(self, problem: Problem) -> str | None:
        """The reasoning that leads to the answer, where the task knows it."""
        if self.family is not None:
            return self.family.worked(problem)
        worked = problem.facts.get("worked")
        return worked if isinstance(worked, str) and worked.strip() else None


@contextlib.contextmanager
def open_task(
    task: str, *, difficulty: int | None = None, seed: int = 0, pool: PoolConfig | None = None
) -> Iterator[TaskSource]:
    """The source that `task` names; worker processes end with the context.

    Raises:
        TaskError: unknown name, a file that cannot be loaded or is no task, a difficulty it does not have.
        DataError: a dataset that is missing or damaged.
    """
    kind, _, rest = task.partition(":")
    if task in TASKS:
        yield _family_source(TASKS[task], difficulty, seed)
        return
    if difficulty is not None:
        raise TaskError(f"difficulty={difficulty} belongs to built-in families; {task} has none.")
    if kind == "jsonl":
        yield _dataset_source(Path(rest), ExactAnswers(), "exact")
        return
    with contextlib.ExitStack() as stack:
        started = stack.enter_context(VerifierPool(_spec_of(task, kind, rest), pool))
        if kind == "math":
            yield replace(_dataset_source(Path(rest), started, "math-verify"), pool=started)
        else:
            yield _module_source(task, started, seed)


class ExactAnswers:
    """The verifier of datasets: exact numbers, or the same words. Pure, total and quick, so it needs no worker."""

    def verify(self, problems: Sequence[Problem], answers: Sequence[str]) -> tuple[list[Grade], float]:
        """A grade each, and the longest time that one took in seconds."""
        slowest_s, grades = 0.0, []
        for problem, answer in zip(problems, answers):
            started_s = time.perf_counter()
            grades.append(Grade(score=float(is_same_answer(problem.answer, answer))))
            slowest_s = max(slowest_s, time.perf_counter() - started_s)
        return grades, slowest_s


class _FamilySets:
    def __init__(self, task: Task, difficulty: int, seed: int) -> None:
        self.task, self.difficulty, self.seed = task, difficulty, seed

    def problems(self, split: str, count: int) -> list[Problem]:
        return family_problems(self.task, split, count, self.difficulty, self.seed)


class _FixedSets:
    """A finite list, split by the hash of the question."""

    def __init__(self, every: Sequence[Problem]) -> None:
        self.every = every

    def problems(self, split: str, count: int) -> list[Problem]:
        unique = {problem.prompt: problem for problem in self.every if split_of(problem.prompt) == split}
        return list(unique.values())[:count]


class _StreamSets:
    """What a task's `problems(seed)` yields, drawn as far as needed and checked on arrival."""

    def __init__(self, name: str, pool: VerifierPool, seed: int) -> None:
        self.name, self.pool, self.seed = name, pool, seed
        self.found: dict[str, dict[str, Problem]] = {"pretrain": {}, "rl": {}, "eval": {}}
        self.drawn, self.repeats, self.has_ended = 0, 0, False

    def problems(self, split: str, count: int) -> list[Problem]:
        known = self.found[split]
        while len(known) < count and not self.has_ended and self.repeats < MAX_REPEATS:
            rows, self.has_ended = self.pool.problems(self.seed, self.drawn, DRAWN_AT_ONCE)
            for row in rows:
                self.drawn += 1
                key, problem = self._problem(row)
                is_known = key in self.found[split_of(key)]
                self.repeats = self.repeats + 1 if is_known else 0
                self.found[split_of(key)].setdefault(key, problem)
        if not known:
            raise TaskError(
                f"the task {self.name} yields no problem for the set {split!r} among its first {self.drawn}; "
                "yield more different ones."
            )
        return list(known.values())[:count]

    def _problem(self, row: Any) -> tuple[str, Problem]:
        place = f"problem {self.drawn} of the task {self.name}"
        if not isinstance(row, dict):
            raise TaskError(f"{place} is a {type(row).__name__}; yield mappings with 'prompt' and 'answer'.")
        prompt, answer = row.get("prompt"), row.get("answer")
        if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROBLEM_CHARS:
            raise TaskError(f"{place} has no usable 'prompt' (a text of 1 to {MAX_PROBLEM_CHARS} characters).")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        if not isinstance(answer, str) or not answer.strip():
            raise TaskError(f"{place} has no 'answer'; a task must know one right answer to each problem, as text.")
        facts = {key: value for key, value in row.items() if key not in ("prompt", "answer", "key")}
        problem = Problem(family=self.name, difficulty=0, prompt=prompt, answer=answer, facts=facts)
        return str(row.get("key", prompt)), problem


def _family_source(task: Task, difficulty: int | None, seed: int) -> TaskSource:
    wanted = task.default_difficulty if difficulty is None else difficulty
    if wanted not in task.difficulties:
        allowed = f"{task.difficulties.start}..{task.difficulties.stop - 1}"
        raise TaskError(f"difficulty {wanted} is outside {task.name}'s {allowed}.")
    return TaskSource(
        name=task.name,
        description=task.description,
        sets=_FamilySets(task, wanted, seed),
        verifier=FamilyVerifier(),
        identity={"task": task.name, "difficulty": wanted, "problem_seed": seed},
        family=task,
    )


def _dataset_source(path: Path, verifier: Verifier, judge: str) -> TaskSource:
    every = read_problems(path)
    return TaskSource(
        name=path.stem,
        description=f"{len(every)} problems of {path.name}, judged by {judge}",
        sets=_FixedSets(every),
        verifier=verifier,
        identity={"task": "dataset", "judge": judge, "digest": _digest(path)},
    )


def _module_source(task: str, pool: VerifierPool, seed: int) -> TaskSource:
    about = pool.about
    if not about["has_problems"]:
        raise TaskError(
            f"the task {task} has no function problems(seed); it must yield mappings with prompt and answer."
        )
    if not about["has_verify"]:
        raise TaskError(f"the task {task} has no function verify(problem, answer).")
    own = tuple(
        WeightedReward(function=pool.reward(name), weight=weight, name=name)
        for name, weight in about["rewards"].items()
    )
    identity = {"task": task if pool.spec.path is None else "file", "problem_seed": seed}
    if pool.spec.path is not None:
        identity["digest"] = _digest(pool.spec.path)
    return TaskSource(
        name=about["name"],
        description=about["description"] or f"the task {task}",
        sets=_StreamSets(about["name"], pool, seed),
        verifier=pool,
        identity=identity,
        rewards=own,
        pool=pool,
        exploits=tuple(about["exploits"]),
    )


def _spec_of(task: str, kind: str, rest: str) -> TaskSpec:
    if kind == "math":
        _need("math_verify", "math-verify", "math")
        return TaskSpec(module="shoal.rl.adapters.math_verify")
    if kind == "gym":
        _need("reasoning_gym", "reasoning-gym", "gym")
        return TaskSpec(module="shoal.rl.adapters.reasoning_gym", options={"name": rest})
    path = Path(task)
    if path.suffix != ".py":
        raise TaskError(
            f"unknown task {task!r}{did_you_mean(task, TASKS)}; give a family ({', '.join(TASKS)}), a Python file, "
            "jsonl:FILE, math:FILE or gym:NAME."
        )
    if not path.is_file():
        raise TaskError(f"there is no task file {path}.")
    return TaskSpec(path=path.resolve())


def _need(module: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise TaskError(f"this task needs {package}, which is not installed; run: pip install 'shoal[{extra}]'")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
