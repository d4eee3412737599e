"""The numbers that explain a reinforcement-learning step, as one line of `metrics.jsonl` and a few answers to read.

What to look at when a run does not learn: `informative_groups` (near 0: every group is all right or all wrong, so nothing
can be learned), `accuracy` against `reward`, `response_tokens_right` against `_wrong`, `truncated`, `entropy` (near 0: the
policy no longer explores), `mismatch_kl` (engine and trainer disagree), `clip_fraction`, and `verifier_failures`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from shoal.device import peak_memory_bytes
from shoal.log import MetricsWriter
from shoal.rl.advantage import informative_groups
from shoal.rl.rewards import RewardTable
from shoal.rl.sampling import StepSample
from shoal.rl.self_checks import count_checks
from shoal.rl.tasks import TASKS
from shoal.rl.tasks.answers import parse_response
from shoal.rl.tasks.task import Problem
from shoal.rl.update import MEANS, UpdateResult

SAMPLE_CHARACTERS = 4000


def step_metrics(
    sample: StepSample, table: RewardTable, updates: Sequence[UpdateResult], *, update_s: float
) -> dict[str, Any]:
    """The values of one metrics line."""
    rollouts, graded = sample.rollouts, sample.graded
    lengths = [len(completion.token_ids) for completion in rollouts.completions]
    right = graded.right
    teaching_P = informative_groups(table.total_M, rollouts.group_size, counted_M=table.counted_M)
    values: dict[str, Any] = {
        "reward": float(table.total_M[table.counted_M].mean()) if bool(table.counted_M.any()) else None,
        "accuracy": mean(right),
        "format": mean([parse_response(text) is not None for text in rollouts.texts]),
        "response_tokens": mean(lengths),
        "response_tokens_right": mean([n for n, is_right in zip(lengths, right) if is_right]),
        "response_tokens_wrong": mean([n for n, is_right in zip(lengths, right) if not is_right]),
        "truncated": mean([completion.finish_reason == "length" for completion in rollouts.completions]),
        "worked_fraction": mean([shows_work(text) for text in rollouts.texts]),
        "informative_groups": float(teaching_P.double().mean()),
        "groups_sampled": sample.groups_sampled,
        **_update_values(updates),
        **_check_values(sample),
        **{f"reward_{name}": table.mean_of(name) for name in table.by_name},
        "left_out": mean((~table.counted_M).tolist()),
        "verifier_s": graded.wall_s,
        "verifier_slowest_s": graded.slowest_s,
        "verifier_failures": dict(graded.failures),
        "reward_failures": dict(table.failures),
        "reward_s": table.wall_s,
        "rollout_s": rollouts.wall_s,
        "update_s": update_s,
        "rollout_tokens_per_s": rollouts.num_response_tokens / max(rollouts.wall_s, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    return values


def write_samples(
    writer: MetricsWriter, stage: str, step: int, sample: StepSample, table: RewardTable, count: int
) -> None:
    """The first answer of some groups, in the lines that the Runs page reads (`samples.jsonl`)."""
    size, every = sample.rollouts.group_size, len(sample.rollouts.texts)
    for place in range(0, min(every, count * size), size):
        writer.write(
            stage,
            step,
            prompt=sample.rollouts.problems[place].prompt[:SAMPLE_CHARACTERS],
            text=sample.rollouts.texts[place][:SAMPLE_CHARACTERS],
            reward=float(table.total_M[place]) if bool(table.counted_M[place]) else None,
            right=sample.graded.right[place],
        )


def shows_work(text: str) -> bool:
    """Whether an answer reasons before answering: a think block with something in it."""
    parsed = parse_response(text)
    return parsed is not None and bool(parsed.thinking.strip())


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None


def _update_values(updates: Sequence[UpdateResult]) -> dict[str, Any]:
    """Means over the updates by tokens; the mismatch is the first's, before any weight moved."""
    tokens = sum(update.num_tokens for update in updates)
    values: dict[str, Any] = {
        name: sum(getattr(update, name) * update.num_tokens for update in updates) / tokens if tokens else None
        for name in MEANS
    }
    first = next((update for update in updates if update.num_tokens), None)
    if first is not None:
        values |= {"mismatch": first.mismatch, "mismatch_kl": first.mismatch_kl}
    norms = [update.grad_norm for update in updates if update.grad_norm is not None]
    return values | {"grad_norm": mean(norms), "max_vio": updates[-1].max_violation if updates else None}


def _check_values(sample: StepSample) -> dict[str, float | None]:
    """How true the equations of the thinking are, and how far the model's own verdicts can be trusted."""
    judges = [partial(_is_right, problem) for problem in sample.rollouts.problems]
    counts = count_checks(sample.rollouts.texts, judges)
    return {
        "equations_true": counts.true_fraction,
        "check_precision": counts.precision,
        "check_recall": counts.recall,
    }


def _is_right(problem: Problem, answer: str) -> bool:
    family = TASKS.get(problem.family)
    return family is not None and family.verify(problem, answer)
