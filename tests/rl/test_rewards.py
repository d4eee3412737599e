import asyncio
import math
import random

import pytest
import torch

from shoal.errors import ConfigError, TaskError
from shoal.rl.rewards import WeightedReward, accuracy_reward, format_reward, random_reward, score_answers
from shoal.rl.tasks import TASKS

PROBLEM = TASKS["addition"].generate(random.Random(0), 2)
RIGHT, WRONG, LOOSE = (
    f"<think></think><answer>{PROBLEM.answer}</answer>",
    "<think></think><answer>-1</answer>",
    str(PROBLEM.answer),
)
ANSWERS = (["p"] * 3, [RIGHT, WRONG, LOOSE], [[1], [2, 3], []])


def _giving(values, name="mine"):
    def reward(prompts, completions, completion_ids, **columns):
        if isinstance(values, Exception):
            raise values
        return values

    return WeightedReward(function=reward, name=name)


def test_accuracy_and_format_score_what_they_say():
    assert accuracy_reward(*ANSWERS, problem=[PROBLEM] * 3) == [1.0, 0.0, 0.0]
    assert accuracy_reward(*ANSWERS, right=[0.5, None, 1.0]) == [0.5, None, 1.0]
    assert format_reward(*ANSWERS) == [1.0, 1.0, 0.0]


def test_random_reward_is_a_seeded_coin_blind_to_the_answer():
    reward, again = random_reward(3), random_reward(3)
    values = reward(["p"] * 1000, [RIGHT] * 1000, [[]] * 1000, step=4)
    assert values == again(["q"] * 1000, [WRONG] * 1000, [[1]] * 1000, step=4)
    assert values != reward(["p"] * 1000, [RIGHT] * 1000, [[]] * 1000, step=5)
    assert abs(sum(values) / 1000 - 0.5) < 0.06


def test_rewards_are_weighted_and_added_and_none_leaves_an_answer_out():
    first = WeightedReward(function=lambda *a, **c: [1, None, None], weight=2.0, name="first")
    second = WeightedReward(function=lambda *a, **c: [0.5, 3.0, None], weight=-1.0, name="second")
    table = score_answers([first, second], *ANSWERS, {})
    assert table.total_M.tolist() == [1.5, -3.0, 0.0] and table.counted_M.tolist() == [True, True, False]
    assert table.mean_of("first") == 1.0 and table.mean_of("second") == 1.75
    assert table.by_name["second"] == [0.5, 3.0, None] and not table.failures


def test_asynchronous_rewards_are_awaited_together():
    waiting = []

    async def slow(prompts, completions, completion_ids, **columns):
        waiting.append(1)
        while len(waiting) < 2:  # only both together get past this
            await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    table = score_answers(
        [WeightedReward(function=slow, name="a"), WeightedReward(function=slow, name="b")], *ANSWERS, {}
    )
    assert torch.equal(table.total_M, torch.tensor([2.0 * len(text) for text in ANSWERS[1]]))


@pytest.mark.parametrize(
    "values, kind",
    [
        ([1.0], "wrong_count"),
        (3, "wrong_count"),
        (None, "wrong_count"),
        ("abc", "wrong_count"),
        ([1.0, math.nan, 0.0], "nan"),
        ([1.0, math.inf, 0.0], "infinite"),
        ([1.0, "x", 0.0], "not_a_number"),
        (ValueError("oh no"), "raised"),
    ],
)
def test_rewards_that_break_their_contract_stop_the_run_or_are_counted(values, kind):
    with pytest.raises(TaskError, match="reward mine"):
        score_answers([_giving(values)], *ANSWERS, {})
    good = _giving([1.0, 1.0, 1.0], name="good")
    table = score_answers([_giving(values), good], *ANSWERS, {}, on_error="skip")
    assert table.failures == {f"mine:{kind}": 1} and table.counted_M.all()
    kept = isinstance(values, list) and len(values) == 3
    assert table.by_name["mine"] == ([1.0, None, 0.0] if kept else [None, None, None])


def test_an_asynchronous_reward_that_raises_is_named_too():
    async def broken(prompts, completions, completion_ids, **columns):
        raise KeyError("gone")

    with pytest.raises(TaskError, match="reward broken raised KeyError"):
        score_answers([WeightedReward(function=broken)], *ANSWERS, {})


def test_a_weight_must_be_a_number():
    with pytest.raises(ConfigError, match="weight=nan of reward mine"):
        WeightedReward(function=accuracy_reward, weight=math.nan, name="mine")
