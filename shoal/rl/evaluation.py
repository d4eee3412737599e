"""What a model can do on held-out problems: pass@k, length, and by which way of answering.

An answer either shows its work (something stands in the think block) or gives the result directly. Keeping the two apart
is what tells elicitation from improvement: a gain in pass@1 is split into choosing to work more often and working better
(`split_gain`). The same numbers on the base are the gate before reinforcement learning: unless working beats answering
directly, reward will teach the model to stop working.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shoal.engine.engine import Engine
from shoal.model.transformer import Transformer
from shoal.rl.grading import FamilyVerifier, Verifier, grade_answers
from shoal.rl.packed_rollouts import pack_rollouts
from shoal.rl.pass_at_k import estimate_pass_at_k
from shoal.rl.rollout import Prompter, Rollouts, sample_rollouts
from shoal.rl.step_metrics import shows_work
from shoal.rl.tasks.task import Problem
from shoal.training.loss import LossWeights, batch_loss, mtp_acceptance

SAMPLES_PER_PASS = 1024
"""Answers in flight at once."""


@dataclass(frozen=True, kw_only=True)
class SkillReport:
    """Sampled accuracy on held-out problems."""

    pass_at: dict[str, float]
    """Unbiased pass@k for k = 1, 2, 4, ... up to the samples per problem."""
    pass_at_1_interval: tuple[float, float]
    """95 % interval, problems as clusters."""
    response_tokens: float
    worked_fraction: float
    accuracy_worked: float | None
    accuracy_direct: float | None
    truncated: float
    mtp_acceptance: float | None
    """Share of the MTP module's drafts that the model itself ranks first, along its own answers; None without MTP."""
    problems: int
    samples_per_problem: int
    verifier_failures: dict[str, int]
    """Answers that could not be judged count as wrong here, and are counted by kind."""
    examples: list[str]
    """The first sample of the first problems."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """One line for people."""
        low, high = self.pass_at_1_interval
        most = max(self.pass_at, key=int)
        parts = [
            f"pass@1 {self.pass_at['1']:.1%} ({low:.1%} to {high:.1%}), pass@{most} {self.pass_at[most]:.1%}",
            f"{self.response_tokens:.1f} tokens per answer",
            f"{self.worked_fraction:.0%} show work (right {_percent(self.accuracy_worked)}; direct {_percent(self.accuracy_direct)})",
        ]
        if self.mtp_acceptance is not None:
            parts.append(f"MTP drafts accepted {self.mtp_acceptance:.0%}")
        if self.verifier_failures:
            parts.append(
                "could not be judged: " + ", ".join(f"{n} {kind}" for kind, n in self.verifier_failures.items())
            )
        return ", ".join(parts)


def measure_skill(
    engine: Engine,
    prompter: Prompter,
    problems: Sequence[Problem],
    *,
    samples_per_problem: int = 16,
    max_tokens: int = 96,
    temperature: float = 1.0,
    seed: int = 1234,
    num_examples: int = 8,
    verifier: Verifier | None = None,
) -> SkillReport:
    """Sample every problem and score by rule. Same seed and weights, same report."""
    texts: list[str] = []
    lengths: list[int] = []
    truncated = 0
    first_rollouts = None
    per_pass = max(1, SAMPLES_PER_PASS // samples_per_problem)
    for start in range(0, len(problems), per_pass):
        part = problems[start : start + per_pass]
        rollouts = sample_rollouts(
            engine,
            prompter,
            part,
            group_size=samples_per_problem,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed + start,
        )
        first_rollouts = first_rollouts or rollouts
        texts += rollouts.texts
        lengths += [len(completion.token_ids) for completion in rollouts.completions]
        truncated += sum(completion.finish_reason == "length" for completion in rollouts.completions)
    every = [problem for problem in problems for _ in range(samples_per_problem)]
    graded = grade_answers(verifier or FamilyVerifier(), every, texts)
    right = graded.right
    worked = [shows_work(text) for text in texts]
    counts = [sum(right[i : i + samples_per_problem]) for i in range(0, len(right), samples_per_problem)]
    ks = [2**power for power in range(samples_per_problem.bit_length()) if 2**power <= samples_per_problem]
    first = estimate_pass_at_k(counts, samples_per_problem)
    return SkillReport(
        pass_at={str(k): estimate_pass_at_k(counts, samples_per_problem, k).mean for k in ks},
        pass_at_1_interval=(first.low, first.high),
        response_tokens=sum(lengths) / len(lengths),
        worked_fraction=sum(worked) / len(worked),
        accuracy_worked=_share(right, worked, True),
        accuracy_direct=_share(right, worked, False),
        truncated=truncated / len(texts),
        mtp_acceptance=draft_acceptance(engine.model, first_rollouts) if first_rollouts else None,
        problems=len(problems),
        samples_per_problem=samples_per_problem,
        verifier_failures=dict(graded.failures),
        examples=texts[::samples_per_problem][:num_examples],
    )


@torch.no_grad()
def draft_acceptance(model: Transformer, rollouts: Rollouts, num_answers: int = 256) -> float | None:
    """How often the first MTP module's greedy draft equals the model's own greedy choice, along sampled answers.

    That is the acceptance rate of greedy speculative decoding on this kind of text. None without MTP modules.
    """
    if not model.config.num_nextn_predict_layers:
        return None
    chosen = range(min(num_answers, len(rollouts.completions)))
    packed = pack_rollouts(rollouts, chosen, [True] * len(rollouts.completions), row_tokens=512)
    arrays = (packed.token_BS, packed.label_BS, packed.document_BS, packed.position_BS)
    loss = batch_loss(model, *arrays, weights=LossWeights(), step_tokens=1)
    accepted, drafted = mtp_acceptance(loss.main, loss.mtp)[0]
    return accepted / drafted if drafted else None


def may_lengthen(base: SkillReport) -> bool:
    """The gate before reinforcement learning: does showing work pay on this base, and does it ever happen?"""
    if base.accuracy_worked is None:
        return False
    return base.accuracy_worked > (base.accuracy_direct or 0.0)


def _share(right: Sequence[bool], worked: Sequence[bool], wanted: bool) -> float | None:
    chosen = [r for r, w in zip(right, worked) if w is wanted]
    return sum(chosen) / len(chosen) if chosen else None


def _percent(value: float | None) -> str:
    return "none seen" if value is None else f"{value:.0%}"
