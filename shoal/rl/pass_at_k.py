"""pass@k, and how far to trust it.

pass@k is the chance that at least one of k samples solves a problem. Estimated by drawing k of the n samples taken,
without replacement, which is unbiased and uses all of them (Chen et al. 2021, arXiv 2107.03374, eq. 1).

Samples of one problem resemble each other, so the number of *problems* limits what is known, not the number of samples.
The interval is Wilson's, with the sample size replaced by the effective one: the size at which independent draws would
have the variance seen between problems. It stays inside [0, 1] and does not collapse at 0 % or 100 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from shoal.errors import TaskError


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over problems with its interval, all as fractions."""

    mean: float
    low: float
    high: float
    num_problems: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k of `num_samples` samples, `num_correct` of which are right, hold a right one.

    Raises:
        TaskError: k exceeds the samples, or more are right than were taken.
    """
    if not 1 <= k <= num_samples:
        raise TaskError(f"pass@{k} needs at least {max(k, 1)} samples per problem and k >= 1; have {num_samples}.")
    if not 0 <= num_correct <= num_samples:
        raise TaskError(f"num_correct={num_correct} must be between 0 and num_samples={num_samples}.")
    num_wrong = num_samples - num_correct
    if num_wrong < k:
        return 1.0
    return 1.0 - math.comb(num_wrong, k) / math.comb(num_samples, k)


def estimate_pass_at_k(
    num_correct_P: Sequence[int], num_samples: int, k: int = 1, *, confidence: float = 0.95
) -> Estimate:
    """Mean pass@k over problems, `num_samples` samples of each, with an interval clustered by problem.

    Args:
        num_correct_P: right samples of each problem.
    Raises:
        TaskError: no problems, or counts that cannot be.
    """
    score_P = [pass_at_k(num_samples, correct, k) for correct in num_correct_P]
    if not score_P:
        raise TaskError("there are no problems to average pass@k over.")
    if not 0 < confidence < 1:
        raise TaskError(f"confidence={confidence} must be between 0 and 1, such as 0.95.")
    mean = sum(score_P) / len(score_P)
    effective = _effective_samples(score_P, mean, num_samples // k)
    low, high = _wilson(mean, effective, NormalDist().inv_cdf(0.5 + confidence / 2))
    return Estimate(mean=mean, low=low, high=high, num_problems=len(score_P))


def _effective_samples(score_P: list[float], mean: float, draws_per_problem: int) -> float:
    """Independent yes-no draws that would vary as much as the mean of `score_P` does.

    At least one per problem, at most one per disjoint group of k samples: between those the data decide.
    """
    num_problems = len(score_P)
    most = num_problems * max(draws_per_problem, 1)
    squares = sum((score - mean) ** 2 for score in score_P)
    if num_problems < 2 or not 0 < mean < 1:
        return float(num_problems)
    if squares == 0:
        return float(most)
    variance_of_mean = squares / (num_problems - 1) / num_problems
    return min(max(mean * (1 - mean) / variance_of_mean, num_problems), most)


def _wilson(mean: float, samples: float, z: float) -> tuple[float, float]:
    shrink = 1 + z * z / samples
    centre = (mean + z * z / (2 * samples)) / shrink
    half = z / shrink * math.sqrt(mean * (1 - mean) / samples + z * z / (4 * samples * samples))
    return max(centre - half, 0.0), min(centre + half, 1.0)
