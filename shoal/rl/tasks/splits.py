"""Disjoint sets of problems: what the base reads, what reinforcement learning asks, what is held out.

A problem's set is decided by the SHA-256 of its key, so two wordings of one problem never fall on both sides of a split.
"""

import hashlib
import random

from shoal.errors import TaskError
from shoal.rl.tasks.task import Problem, Task

SHARES = (("pretrain", 0.6), ("rl", 0.3), ("eval", 0.1))
TRIES_PER_PROBLEM = 400


def split_of(key: str, shares: tuple[tuple[str, float], ...] = SHARES) -> str:
    """The set that a problem key belongs to."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for name, share in shares:
        if place < share:
            return name
        place -= share
    return shares[-1][0]


def problems(task: Task, split: str, count: int, difficulty: int, seed: int) -> list[Problem]:
    """`count` different problems of a split.

    Raises:
        TaskError: the difficulty is outside the task's range, or the split does not hold that many.
    """
    if difficulty not in task.difficulties:
        allowed = f"{task.difficulties.start}..{task.difficulties.stop - 1}"
        raise TaskError(f"difficulty {difficulty} is outside {task.name}'s {allowed}.")
    rng = random.Random(f"{task.name}-{split}-{seed}")
    found: dict[str, Problem] = {}
    for _ in range(count * TRIES_PER_PROBLEM):
        problem = task.generate(rng, difficulty)
        key = task.key(problem)
        if key not in found and split_of(key) == split:
            found[key] = problem
            if len(found) == count:
                return list(found.values())
    raise TaskError(
        f"{task.name} at difficulty {difficulty} gave only {len(found)} different problems for {split!r}; "
        f"ask for fewer than {count} or raise the difficulty."
    )
