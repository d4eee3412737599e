import random
from itertools import combinations

import pytest

from shoal.errors import TaskError
from shoal.rl.pass_at_k import estimate_pass_at_k, pass_at_k


@pytest.mark.parametrize(("samples", "correct"), [(6, 0), (6, 1), (6, 2), (6, 5), (6, 6), (4, 2)])
def test_pass_at_k_equals_counting_every_subset(samples: int, correct: int) -> None:
    right = [True] * correct + [False] * (samples - correct)
    for k in range(1, samples + 1):
        subsets = list(combinations(right, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_large_counts_do_not_overflow() -> None:
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_interval_of_one_sample_per_problem_is_wilsons() -> None:
    # 81 of 263, the worked example of Newcombe (1998), Statistics in Medicine 17, 857, method 3.
    estimate = estimate_pass_at_k([1] * 81 + [0] * 182, 1)
    assert estimate.mean == pytest.approx(81 / 263)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)


def test_samples_that_repeat_each_other_do_not_narrow_the_interval() -> None:
    alone = estimate_pass_at_k([1] * 7 + [0] * 13, 1)
    repeated = estimate_pass_at_k([16] * 7 + [0] * 13, 16)
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))
    spread = estimate_pass_at_k([6, 5, 6, 6, 5, 6, 5, 6, 5, 6], 16)
    assert spread.high - spread.low < 0.4 * (repeated.high - repeated.low)


@pytest.mark.parametrize("count", [0, 8])
def test_interval_does_not_collapse_when_all_is_wrong_or_right(count: int) -> None:
    estimate = estimate_pass_at_k([count] * 20, 8)
    assert 0.1 < estimate.high - estimate.low < 0.3
    assert estimate.low <= estimate.mean <= estimate.high


def test_interval_covers_the_truth_about_as_often_as_it_claims() -> None:
    source = random.Random(3)
    covered = 0
    for _ in range(400):
        # Problems differ in difficulty: a Beta(1, 2) chance each, so the true mean pass@1 is 1/3.
        counts = [sum(source.random() < p for _ in range(8)) for p in (source.betavariate(1, 2) for _ in range(60))]
        estimate = estimate_pass_at_k(counts, 8)
        covered += estimate.low <= 1 / 3 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.98


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(TaskError, match="pass@9"):
        pass_at_k(8, 2, 9)
    with pytest.raises(TaskError, match="num_correct=9"):
        pass_at_k(8, 9, 1)
    with pytest.raises(TaskError, match="no problems"):
        estimate_pass_at_k([], 4)
    with pytest.raises(TaskError, match="confidence=95"):
        estimate_pass_at_k([1], 4, confidence=95)
