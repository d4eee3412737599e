import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import TaskError
from shoal.rl.advantage import group_advantages, informative_fraction, rloo_advantages


def test_std_advantages_match_a_hand_computed_group() -> None:
    reward_M = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    std = math.sqrt((2 * (2 / 3) ** 2 + 4 * (1 / 3) ** 2) / 2 / 2)
    assert std == pytest.approx(math.sqrt(1 / 3))
    wanted = [(2 / 3) / (std + 1e-4), (-1 / 3) / (std + 1e-4), (-1 / 3) / (std + 1e-4)] * 2
    assert group_advantages(reward_M, 3).tolist() == pytest.approx(wanted, abs=1e-12)


def test_unscaled_advantages_are_reward_minus_group_mean() -> None:
    reward_M = torch.tensor([1.0, 0.0, 3.0, 5.0])
    assert group_advantages(reward_M, 2, scale="none").tolist() == [0.5, -0.5, -1.0, 1.0]


def test_leave_one_out_is_unscaled_times_group_over_others() -> None:
    reward_M = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.2], dtype=torch.float64)
    wanted = group_advantages(reward_M, 4, scale="none") * 4 / 3
    torch.testing.assert_close(rloo_advantages(reward_M, 4), wanted)


def test_a_group_of_equal_rewards_gets_exactly_zero() -> None:
    reward_M = torch.tensor([0.1] * 7 + [0.0] * 6 + [1.0])
    for advantage_M in (group_advantages(reward_M, 7), rloo_advantages(reward_M, 7)):
        assert advantage_M[:7].tolist() == [0.0] * 7
        assert advantage_M[7:].abs().min() > 0


def test_a_group_of_one_gets_zero() -> None:
    assert group_advantages(torch.tensor([1.0, 0.0]), 1).tolist() == [0.0, 0.0]


def test_integer_rewards_are_accepted() -> None:
    assert group_advantages(torch.tensor([1, 0]), 2, scale="none").tolist() == [0.5, -0.5]


def test_informative_fraction_counts_groups_that_differ() -> None:
    assert informative_fraction(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), 2) == pytest.approx(1 / 3)


@given(st.lists(st.lists(st.floats(-100, 100), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(groups: list[list[float]]) -> None:
    reward_PO = torch.tensor(groups, dtype=torch.float64)
    advantage_PO = group_advantages(reward_PO.flatten(), 4).view(-1, 4)
    assert advantage_PO.sum(dim=1).abs().max() < 1e-6
    for rewards, advantages in zip(reward_PO.tolist(), advantage_PO.tolist()):
        by_reward = [a for _, a in sorted(zip(rewards, advantages))]
        assert by_reward == sorted(by_reward)


@pytest.mark.parametrize("size", [0, 2, 5])
def test_groups_that_do_not_come_out_even_are_refused(size: int) -> None:
    with pytest.raises(TaskError, match=f"group_size={size}"):
        group_advantages(torch.ones(3), size)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(TaskError, match=r"answer 2"):
        group_advantages(torch.tensor([0.0, 1.0, bad, 0.0]), 2)


def test_leave_one_out_refuses_a_group_of_one_and_an_unknown_scale_is_named() -> None:
    with pytest.raises(TaskError, match="needs 2 or more"):
        rloo_advantages(torch.ones(3), 1)
    with pytest.raises(TaskError, match="'variance' is unknown"):
        group_advantages(torch.ones(2), 2, scale="variance")  # type: ignore[arg-type]
