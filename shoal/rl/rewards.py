"""Rule rewards: functions from answers to numbers, in the signature users know from TRL.

`reward(prompts, completions, completion_ids, **columns) -> list[float | None]`, one value per answer, None where the
reward does not apply. R1-Zero uses two, accuracy and format (R1 §2.2.2); `random_reward` is the control that must not
teach anything.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from shoal.errors import TaskError
from shoal.rl.tasks import TASKS
from shoal.rl.tasks.answers import parse_response

Reward = Callable[..., Sequence[float | None]]


def accuracy_reward(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any
) -> list[float]:
    """1 where the response is well-formed and its answer right. Column `problem`: the `Problem` of each answer."""
    del prompts, completion_ids
    return [float(is_right(problem, text)) for problem, text in zip(columns["problem"], completions)]


def format_reward(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any
) -> list[float]:
    """1 where the response is exactly one think block and one answer block."""
    del prompts, completion_ids, columns
    return [float(parse_response(text) is not None) for text in completions]


def random_reward(seed: int) -> Reward:
    """A control: heads or tails, whatever was answered."""
    generator = random.Random(seed)

    def reward(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any
    ) -> list[float]:
        del prompts, completion_ids, columns
        return [float(generator.random() < 0.5) for _ in completions]

    return reward


def is_right(problem: Any, text: str) -> bool:
    """Whether a whole response answers `problem` in the required format."""
    parsed = parse_response(text)
    return parsed is not None and TASKS[problem.family].verify(problem, parsed.answer)


def check_reward_output(values: Any, count: int, *, name: str = "reward") -> list[float | None]:
    """The values as a list, once they are known to be one finite number or None per answer.

    Raises:
        TaskError: wrong count, NaN, infinity or something that is no number.
    """
    if not isinstance(values, Sequence) or len(values) != count:
        found = len(values) if isinstance(values, Sequence) else type(values).__name__
        raise TaskError(f"{name} returned {found} values for {count} answers; it must return one per answer.")
    for value in values:
        if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
            raise TaskError(
                f"{name} returned {value!r}; every value must be a finite number, or None to leave the answer out."
            )
    return list(values)
