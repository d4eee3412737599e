"""Rule rewards: functions from answers to numbers, in the signature users know from TRL.

`reward(prompts, completions, completion_ids, **columns) -> list[float | None]`, one value per answer, None where the
reward does not apply; it may be `async`. Several are added up by weight. R1-Zero uses two, accuracy and format (R1 §2.2.2);
R1 adds language consistency (`language.py`); `random_reward` is the control that must not teach anything.

The columns are `problem`, its `answer`, `family`, `difficulty` and every fact that all problems of the step have, and
`right`: what the verifier said, so that it runs once however many rewards look at it. `step` is one number.

What a reward gets wrong is named and counted, never turned into a zero. By default the run stops (`TaskError`); with
`on_error="skip"` the broken values count as None and the run goes on. An answer for which every reward is None is left out:
it neither learns nor counts in its group's mean.
"""

import asyncio
import inspect
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.errors import ConfigError, TaskError
from shoal.rl.tasks import TASKS
from shoal.rl.tasks.answers import parse_response

Reward = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]

OnError = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class WeightedReward:
    """One term of the total."""

    function: Reward
    weight: float = 1.0
    name: str = ""
    """In metrics and messages; default the function's own."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"weight={self.weight} of reward {self.title} must be a finite number.")

    @property
    def title(self) -> str:
        return self.name or str(getattr(self.function, "__name__", type(self.function).__name__))


@dataclass
class RewardTable:
    """What a batch of answers scored."""

    total_M: Tensor
    """Weighted sums, float32; 0 where nothing counted."""
    counted_M: Tensor
    """False where every reward was None."""
    by_name: dict[str, list[float | None]]
    failures: Counter[str] = field(default_factory=Counter)
    """How often rewards broke their contract, by `name:kind`."""
    wall_s: float = 0.0

    def mean_of(self, name: str) -> float | None:
        """Mean over the answers that the reward applies to."""
        values = [value for value in self.by_name[name] if value is not None]
        return sum(values) / len(values) if values else None


def score_answers(
    rewards: Sequence[WeightedReward],
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, Any],
    *,
    on_error: OnError = "stop",
) -> RewardTable:
    """Call every reward, asynchronous ones side by side, and add up.

    Raises:
        TaskError: a reward raised, returned another number of values, or a value that is no finite number, and
            `on_error` is "stop".
    """
    started_s = time.perf_counter()
    returned = _call_all(rewards, prompts, completions, completion_ids, columns)
    count = len(completions)
    total_M, counted_M = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
    by_name: dict[str, list[float | None]] = {}
    failures: Counter[str] = Counter()
    for reward, values in zip(rewards, returned):
        checked, problems = checked_values(values, count)
        if problems and on_error == "stop":
            raise TaskError(f"reward {reward.title} {problems[0][1]}")
        failures.update(f"{reward.title}:{kind}" for kind, _ in problems)
        by_name[reward.title] = checked
        for index, value in enumerate(checked):
            if value is not None:
                total_M[index] += reward.weight * value
                counted_M[index] = True
    return RewardTable(
        total_M=total_M.float(),
        counted_M=counted_M,
        by_name=by_name,
        failures=failures,
        wall_s=time.perf_counter() - started_s,
    )


def checked_values(values: Any, count: int) -> tuple[list[float | None], list[tuple[str, str]]]:
    """What a reward returned as numbers or None, and what is wrong with it as (kind, the rest of a sentence).

    Kinds: `raised` (an exception in the place of values), `wrong_count`, `not_a_number`, `nan`, `infinite`.
    """
    nothing: list[float | None] = [None] * count
    if isinstance(values, Exception):
        return nothing, [
            ("raised", f"raised {type(values).__name__}: {values}; it must return one number or None per answer.")
        ]
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        found = len(values) if isinstance(values, Sequence) else type(values).__name__
        return nothing, [
            ("wrong_count", f"returned {found} values for {count} answers; it must return one per answer.")
        ]
    problems = [(kind, place) for place, value in enumerate(values) if (kind := _fault(value))]
    advice = "every value must be a finite number, or None to leave the answer out."
    said = [(kind, f"returned {values[place]!r} for answer {place} ({kind}); {advice}") for kind, place in problems]
    broken = {place for _, place in problems}
    return [None if place in broken or value is None else float(value) for place, value in enumerate(values)], said


def accuracy_reward(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 where the response is well-formed and its answer right, None where the verifier failed.

    Columns: `right`, what the verifier said of each answer; without it `problem`, of a built-in family.
    """
    del prompts, completion_ids
    if "right" in columns:
        return list(columns["right"])
    return [float(is_right(problem, text)) for problem, text in zip(columns["problem"], completions)]


def format_reward(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any
) -> list[float]:
    """1 where the response is exactly one think block and one answer block."""
    del prompts, completion_ids, columns
    return [float(parse_response(text) is not None) for text in completions]


def random_reward(seed: int) -> Reward:
    """A control: heads or tails for each place of each step, whatever was answered there."""

    def random_reward(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any
    ) -> list[float]:
        del prompts, completion_ids
        step = columns.get("step", 0)
        return [float(random.Random(f"{seed}-{step}-{place}").random() < 0.5) for place in range(len(completions))]

    return random_reward


R1_ZERO_REWARDS = (
    WeightedReward(function=accuracy_reward, name="accuracy"),
    WeightedReward(function=format_reward, weight=0.1, name="format"),
)
"""Accuracy and format. R1-Zero adds them equally; a base that already keeps the format needs less of the second."""


def is_right(problem: Any, text: str) -> bool:
    """Whether a whole response answers `problem`, of a built-in family, in the required format."""
    parsed = parse_response(text)
    return parsed is not None and TASKS[problem.family].verify(problem, parsed.answer)


def _fault(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, int | float):
        return "not_a_number"
    if math.isnan(value):
        return "nan"
    return "infinite" if math.isinf(value) else None


def _call_all(
    rewards: Sequence[WeightedReward],
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, Any],
) -> list[Any]:
    """What each returned, or the exception it raised; the awaitable ones are awaited together."""
    returned = [_call(reward.function, prompts, completions, completion_ids, columns) for reward in rewards]
    waiting = [index for index, value in enumerate(returned) if inspect.isawaitable(value)]
    if waiting:
        found = asyncio.run(_gather([returned[index] for index in waiting]))
        for index, value in zip(waiting, found):
            if isinstance(value, BaseException) and not isinstance(value, Exception):
                raise value
            returned[index] = value
    return returned


def _call(function: Reward, *arguments: Any) -> Any:
    *positional, columns = arguments
    try:
        return function(*positional, **columns)
    except Exception as error:  # a user's function may raise anything; it is named and counted by the caller
        return error


async def _gather(waiting: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*waiting, return_exceptions=True)
