import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import TaskError
from shoal.rl.advantage import (
    group_advantages,
    informative_fraction,
    informative_groups,
    overlong_penalty,
    rloo_advantages,
)


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


@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_informative_groups_are_those_with_some_but_not_all_answers_right(right: list[bool]) -> None:
    counts = [sum(right[start : start + 4]) for start in range(0, 12, 4)]
    assert informative_groups(torch.tensor(right).float(), 4).tolist() == [0 < count < 4 for count in counts]


def test_a_group_that_is_not_informative_has_no_advantage_and_every_other_has() -> None:
    score_M = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert informative_groups(score_M, 3).tolist() == (group_advantages(score_M, 3).view(3, 3) != 0).any(1).tolist()


def test_overlong_penalty_falls_over_the_published_cache() -> None:
    length_M = torch.tensor([0, 16384, 16385, 18432, 20480, 20481, 99999])
    wanted = [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0, -1.0]
    assert overlong_penalty(length_M, 20480, 4096).tolist() == wanted


@pytest.mark.parametrize(
    ("lengths", "limit", "cache", "message"),
    [
        ([3], 10, 0, "cache_tokens=0"),
        ([3], 10, 11, "max_response_tokens=10"),
        ([3, -1], 10, 2, r"\[3, -1\]"),
    ],
)
def test_impossible_overlong_settings_are_refused(lengths: list[int], limit: int, cache: int, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        overlong_penalty(torch.tensor(lengths), limit, cache)


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


@pytest.mark.parametrize("kind", ["std", "none", "rloo"])
def test_answers_nobody_could_judge_are_no_part_of_their_group(kind):
    """The others' advantages are those of the group without them; theirs are zero."""
    reward = torch.tensor([1.0, 0.0, 9.0, 0.5, 2.0, 2.0, 7.0, 2.0])
    counted = torch.tensor([True, True, False, True, True, True, False, True])

    def of(values, size, **options):
        return (
            rloo_advantages(values, size, **options)
            if kind == "rloo"
            else group_advantages(values, size, scale=kind, **options)
        )

    found = of(reward, 4, counted_M=counted)
    assert torch.allclose(found[[0, 1, 3]], of(reward[[0, 1, 3]], 3)) and found[2] == 0
    assert not found[4:].any()  # what is left of the second group is all alike
    assert informative_groups(reward, 4, counted_M=counted).tolist() == [True, False]


def test_a_group_that_nobody_could_judge_teaches_nothing():
    reward, nobody = torch.tensor([1.0, 0.0]), torch.tensor([False, False])
    assert not group_advantages(reward, 2, counted_M=nobody).any()
    assert informative_groups(reward, 2, counted_M=nobody).tolist() == [False]
    broken = torch.tensor([torch.nan, 1.0, 0.0, 1.0])
    assert group_advantages(broken, 4, counted_M=torch.tensor([False, True, True, True])).isfinite().all()
