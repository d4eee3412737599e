"""From scores to tokens: the samples of a batch, each with its own rules, form, cuts and seed.

A token depends on its line of scores, on the tokens before it, on its seed and its place, and on nothing else; so a guess
(`speculative.py`) is accepted exactly when plain decoding would have drawn it, also under penalties, budgets and forms.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shoal.engine.logit_rules import Constraint, apply_rules, top_logprobs
from shoal.engine.request import FinishReason, Request, TokenEvent
from shoal.engine.sampling import RowSampling, sample_tokens
from shoal.engine.scheduler import Sequence
from shoal.errors import RequestError


@dataclass(eq=False, kw_only=True)
class Sample(Sequence):
    """A sequence with what drawing needs."""

    request: Request
    seed: np.uint64
    stop: frozenset[int]
    constraint: Constraint | None = None
    siblings: list["Sample"] = field(default_factory=list)
    """Other samples of the same prompt; they start when it has been read, and find it in the cache."""
    ahead: int = 0
    """Leading positions whose latents of the prediction module are in the pages."""

    @property
    def drawn(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def may_draw(self) -> int:
        """Tokens that may still be generated."""
        return self.request.sampling.max_tokens - self.drawn


@dataclass(frozen=True)
class Drawn:
    """A token drawn for a sample."""

    token: int
    logprob: float
    is_fine: bool
    """Whether the scores were finite and the form still holds."""
    likely: list[tuple[int, float]]


def draw(samples: Many[Sample], logit_NV: Tensor) -> list[Drawn]:
    """One token for each sample from its line of scores, which may be overwritten."""
    params = [sample.request.sampling for sample in samples]
    top: list[list[tuple[int, float]]] = [[] for _ in samples]
    if any(each.top_logprobs for each in params):
        top = top_logprobs(logit_NV, max(each.top_logprobs for each in params))
    failed = _bend(samples, logit_NV)
    rows = RowSampling(
        temperature_N=torch.tensor([each.temperature for each in params]),
        top_p_N=torch.tensor([each.top_p for each in params]),
        top_k_N=torch.tensor([each.top_k for each in params]),
        seed_N=np.array([sample.seed for sample in samples], dtype=np.uint64),
    )
    drawn_N = torch.tensor([sample.drawn for sample in samples])
    token_N, logprob_N, finite_N = (column.tolist() for column in sample_tokens(logit_NV, rows, drawn_N))
    return [
        Drawn(token, logprob, finite and row not in failed, likely[: each.top_logprobs])
        for row, (token, logprob, finite, likely, each) in enumerate(zip(token_N, logprob_N, finite_N, top, params))
    ]


def take(sample: Sample, drawn: Drawn) -> TokenEvent:
    """Append a drawn token to its sample; how the world hears of it."""
    if drawn.is_fine:
        sample.token_ids.append(drawn.token)
        if sample.constraint is not None:
            sample.constraint.advance(drawn.token)
    reason: FinishReason | None = "stop" if drawn.token in sample.stop else "length" if sample.may_draw < 1 else None
    return TokenEvent(
        request_id=sample.request_id,
        sample=sample.sample,
        token_id=drawn.token if drawn.is_fine else None,
        logprob=drawn.logprob,
        finish_reason=reason if drawn.is_fine else "error",
        top=tuple(drawn.likely),
        found_tokens=sample.found_tokens,
    )


def _bend(samples: Many[Sample], logit_NV: Tensor) -> set[int]:
    """Apply rules and forms to the rows that have any, in place; returns the rows whose form broke."""
    failed = set()
    for row, sample in enumerate(samples):
        rules = sample.request.sampling.rules
        if rules is None and sample.constraint is None:
            continue
        try:
            logit_NV[row] = apply_rules(
                logit_NV[row],
                rules,
                sample.constraint,
                prompt_ids=sample.token_ids[: sample.prompt_tokens],
                generated_ids=sample.token_ids[sample.prompt_tokens :],
                stop_ids=sample.stop,
                temperature=sample.request.sampling.temperature,
            )
        except RequestError:
            failed.add(row)
    return failed
