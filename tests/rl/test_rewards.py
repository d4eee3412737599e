import math
import random

import pytest

from shoal.errors import TaskError
from shoal.rl.rewards import accuracy_reward, check_reward_output, format_reward, random_reward
from shoal.rl.tasks import TASKS

PROBLEM = TASKS["addition"].generate(random.Random(0), 2)
RIGHT, WRONG, LOOSE = (
    f"<think></think><answer>{PROBLEM.answer}</answer>",
    "<think></think><answer>-1</answer>",
    str(PROBLEM.answer),
)


def test_accuracy_and_format_score_what_they_say():
    texts = [RIGHT, WRONG, LOOSE]
    arguments = (["p"] * 3, texts, [[]] * 3)
    assert accuracy_reward(*arguments, problem=[PROBLEM] * 3) == [1.0, 0.0, 0.0]
    assert format_reward(*arguments) == [1.0, 1.0, 0.0]


def test_random_reward_is_a_seeded_coin_blind_to_the_answer():
    reward, again = random_reward(3), random_reward(3)
    values = reward(["p"] * 1000, [RIGHT] * 1000, [[]] * 1000)
    assert values == again(["p"] * 1000, [WRONG] * 1000, [[]] * 1000)
    assert abs(sum(values) / 1000 - 0.5) < 0.06


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [1.0, math.inf], [1.0, "x"], 3, None])
def test_rewards_that_break_their_contract_are_named(values):
    with pytest.raises(TaskError, match="mine"):
        check_reward_output(values, 2, name="mine")


def test_none_means_no_reward():
    assert check_reward_output([None, 1], 2) == [None, 1]
