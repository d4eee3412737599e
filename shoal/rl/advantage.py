"""How much better than its own group an answer was: the baseline that replaces the critic.

GRPO (DeepSeekMath §4.1) samples several answers to one question and takes the group's mean reward as the baseline and
its standard deviation as the scale. Dr. GRPO (arXiv 2503.20783) leaves the scale out, because it weights questions by
how rarely they are answered; RLOO compares each answer with the mean of the *others*. All three give zero to a group
whose answers scored alike: such a group teaches nothing, and `informative_fraction` says how many are left.

DAPO (arXiv 2503.14476) draws the consequence: groups that are all right or all wrong are replaced by others before the
update (dynamic sampling; `informative_groups` is its predicate), and answers near the length limit lose reward gradually
instead of being cut off as if they were wrong (`overlong_penalty`).
"""

from typing import Literal

import torch
from torch import Tensor

from shoal.errors import TaskError


def group_advantages(
    reward_M: Tensor,
    group_size: int,
    *,
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-4,
    counted_M: Tensor | None = None,
) -> Tensor:
    """`(reward - group mean) / (group standard deviation + eps)`, or without the division.

    Args:
        reward_M: one reward per answer; the answers to one question stand next to each other.
        scale: "std" (GRPO; Bessel-corrected, as the open frameworks do) or "none" (Dr. GRPO).
        counted_M: false where nobody could judge: such answers get zero and are no part of their group's mean and spread.
    Returns:
        float32 or float64 `[M]`; exactly zero in groups whose rewards are all equal.
    Raises:
        TaskError: the groups do not come out even, or a reward that counts is not finite.
    """
    reward_PO, counted_PO, number_P1 = _counted(reward_M, group_size, counted_M)
    mean_P1 = reward_PO.sum(dim=1, keepdim=True) / number_P1.clamp_min(1)
    centred_PO = torch.where(counted_PO, reward_PO - mean_P1, 0.0)
    if scale == "std":
        variance_P1 = centred_PO.square().sum(dim=1, keepdim=True) / (number_P1 - 1).clamp_min(1)
        centred_PO = centred_PO / (variance_P1.sqrt() + eps) if group_size > 1 else centred_PO
    elif scale != "none":
        raise TaskError(f"advantage scale {scale!r} is unknown; use 'std' or 'none'.")
    return _silence_equal_groups(centred_PO, reward_PO, counted_PO).flatten()


def rloo_advantages(reward_M: Tensor, group_size: int, *, counted_M: Tensor | None = None) -> Tensor:
    """Reward minus the mean of the group's other rewards (leave-one-out); arguments as in `group_advantages`."""
    reward_PO, counted_PO, number_P1 = _counted(reward_M, group_size, counted_M)
    if group_size < 2:
        raise TaskError(f"group_size={group_size} has no other answers to compare with; leave-one-out needs 2 or more.")
    others_PO = (reward_PO.sum(dim=1, keepdim=True) - reward_PO) / (number_P1 - 1).clamp_min(1)
    return _silence_equal_groups(reward_PO - others_PO, reward_PO, counted_PO).flatten()


def informative_groups(score_M: Tensor, group_size: int, *, counted_M: Tensor | None = None) -> Tensor:
    """Which groups teach something: bool `[groups]`, true where the answers' scores differ.

    Dynamic sampling keeps these and samples on until the batch is full (DAPO eq. 11, `0 < right answers < group size`).

    Args:
        score_M: accuracy, to follow the paper; with a shaped reward, lengths alone would make a group look informative.
    Raises:
        TaskError: the groups do not come out even, or a score is not finite.
    """
    reward_PO, counted_PO, _ = _counted(score_M, group_size, counted_M)
    return _differs(reward_PO, counted_PO)


def informative_fraction(reward_M: Tensor, group_size: int) -> float:
    """Share of the groups whose rewards differ: the questions that still teach something."""
    return float(informative_groups(reward_M, group_size).double().mean())


def overlong_penalty(length_M: Tensor, max_response_tokens: int, cache_tokens: int) -> Tensor:
    """What to add to the reward for length: 0, falling to -1 over the last `cache_tokens` before the limit.

    DAPO eq. 13 (soft overlong punishment); published limit 20480, cache 4096, on top of a reward of 1 or -1.

    Args:
        length_M: response tokens of each answer.
    Returns:
        float32 `[M]`.
    Raises:
        TaskError: the cache is empty or larger than the limit, or a length is negative.
    """
    if not 0 < cache_tokens <= max_response_tokens:
        raise TaskError(
            f"cache_tokens={cache_tokens} must be at least 1 and at most max_response_tokens={max_response_tokens}; "
            "the published share is a fifth of it."
        )
    if length_M.ndim != 1 or bool((length_M < 0).any()):
        raise TaskError(f"lengths must be one count per answer, 0 or more; got {length_M.tolist()}.")
    free_tokens = max_response_tokens - cache_tokens
    return ((free_tokens - length_M.float()) / cache_tokens).clamp(-1.0, 0.0)


def _grouped(reward_M: Tensor, group_size: int) -> Tensor:
    if reward_M.ndim != 1 or group_size < 1 or len(reward_M) == 0 or len(reward_M) % group_size:
        raise TaskError(
            f"rewards of shape {list(reward_M.shape)} do not split into groups of group_size={group_size}; "
            "pass one reward per answer, all answers of a question together."
        )
    if not reward_M.is_floating_point():
        reward_M = reward_M.float()
    broken = torch.nonzero(~torch.isfinite(reward_M))
    if len(broken):
        place = int(broken[0])
        raise TaskError(f"reward {float(reward_M[place])} of answer {place} is not a finite number; fix the reward.")
    return reward_M.view(-1, group_size)


def _counted(reward_M: Tensor, group_size: int, counted_M: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards by group with zeros where nothing counts, what counts, and how much of each group that is."""
    if counted_M is None:
        counted_M = torch.ones(reward_M.shape, dtype=torch.bool, device=reward_M.device)
    if counted_M.shape != reward_M.shape:
        raise TaskError(f"counted_M of shape {list(counted_M.shape)} must say of each reward whether it counts.")
    reward_PO = _grouped(torch.where(counted_M.bool(), reward_M, torch.zeros_like(reward_M)), group_size)
    counted_PO = counted_M.bool().view(-1, group_size)
    return reward_PO, counted_PO, counted_PO.sum(dim=1, keepdim=True)


def _differs(reward_PO: Tensor, counted_PO: Tensor | None = None) -> Tensor:
    if counted_PO is None:
        return reward_PO.amax(dim=1) > reward_PO.amin(dim=1)
    highest_P = reward_PO.masked_fill(~counted_PO, -torch.inf).amax(dim=1)
    return highest_P > reward_PO.masked_fill(~counted_PO, torch.inf).amin(dim=1)


def _silence_equal_groups(advantage_PO: Tensor, reward_PO: Tensor, counted_PO: Tensor) -> Tensor:
    # A mean of equal floats may miss them by an ulp; divided by eps that would pass for a signal.
    speaks_PO = _differs(reward_PO, counted_PO).unsqueeze(1) & counted_PO
    return torch.where(speaks_PO, advantage_PO, torch.zeros_like(advantage_PO))
