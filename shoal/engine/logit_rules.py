"""What a request asks of the scores before a token is drawn: penalties, biases, floors, bans, a budget for thinking.

The order is vLLM's (its V1 sampler): allowed and banned tokens, minimum length, logit bias, penalties, temperature, min-p,
then top-k and top-p. Only rows of requests that ask for something are touched, so nobody else pays.

    frequency  score - penalty * times generated so far         (OpenAI's definition)
    presence   score - penalty, if generated at all
    repetition score / penalty if positive, else score * penalty, for tokens of prompt and answer (CTRL, arXiv 1909.05858)
    min-p      tokens less likely than min_p times the likeliest are dropped (arXiv 2407.01082)
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.errors import RequestError

BANNED = -1e9
"""Finite stand-in for minus infinity, which would make a row of nothing else into NaN."""


class Constraint(Protocol):
    """Says which tokens may come next, see `grammar.py`."""

    def mask(self) -> Tensor:
        """Bool `[V]`: allowed tokens."""
        ...

    def advance(self, token_id: int) -> None:
        """Take note of a token that was drawn."""
        ...


@dataclass(frozen=True, kw_only=True)
class LogitRules:
    """The rules of one request; defaults change nothing."""

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their scores; -100 bans and 100 forces, as with OpenAI."""
    min_tokens: int = 0
    """Stop tokens are banned until so many were generated."""
    thinking_budget: int | None = None
    """Tokens of thinking after which its end is forced."""
    end_think_id: int | None = None
    thinks_from_start: bool = False
    """The template itself opened the thinking."""
    think_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise RequestError(f"{name}={getattr(self, name)} must be between -2 and 2.")
        if not 0 < self.repetition_penalty <= 10:
            raise RequestError(
                f"repetition_penalty={self.repetition_penalty} must be above 0 (1 is off) and at most 10."
            )
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p={self.min_p} must be between 0 (off) and 1.")
        if self.min_tokens < 0:
            raise RequestError(f"min_tokens={self.min_tokens} must not be negative.")
        if any(not math.isfinite(bias) for _, bias in self.logit_bias):
            raise RequestError("logit_bias holds a number that is not finite.")
        if self.thinking_budget is not None and self.end_think_id is None:
            raise RequestError("a thinking budget needs a model whose tokenizer has </think>.")

    def check(self, vocab_size: int) -> None:
        """Refuse token ids that the model has not got.

        Raises:
            RequestError: names the id.
        """
        for token, _ in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise RequestError(f"logit_bias names token {token}; this model's are 0..{vocab_size - 1}.")


def apply_rules(
    score_V: Tensor,
    rules: LogitRules | None,
    constraint: Constraint | None,
    *,
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
    stop_ids: frozenset[int],
    temperature: float,
) -> Tensor:
    """The scores of one row after its rules; a new tensor."""
    score_V = score_V.clone()
    if constraint is not None:
        _keep_to_form(score_V, constraint.mask())
    if rules is None:
        return score_V
    if len(generated_ids) < rules.min_tokens:
        score_V[list(stop_ids)] = BANNED
    for token, bias in rules.logit_bias:
        score_V[token] += BANNED if bias <= -100 else -BANNED if bias >= 100 else bias
    _penalise(score_V, rules, prompt_ids, generated_ids)
    if rules.min_p > 0:
        hot = temperature or 1.0
        likely_V = (score_V / hot).softmax(dim=-1)
        score_V.masked_fill_(likely_V < rules.min_p * likely_V.max(), BANNED)
    if rules.thinking_budget is not None and _thought(rules, generated_ids) >= rules.thinking_budget:
        assert rules.end_think_id is not None
        kept = float(score_V[rules.end_think_id])
        score_V.fill_(BANNED)
        score_V[rules.end_think_id] = max(kept, 0.0)
    return score_V


def _keep_to_form(score_V: Tensor, allowed_K: Tensor) -> None:
    """Ban what the form does not allow. Embeddings are often padded beyond the tokenizer: those ids are never allowed."""
    known = min(len(allowed_K), len(score_V))
    score_V[known:] = BANNED
    score_V[:known].masked_fill_(~allowed_K[:known], BANNED)


def top_logprobs(score_NV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of each row with their natural log-probabilities, before temperature and cuts."""
    log_probability_NV = score_NV.log_softmax(dim=-1)
    values_NK, token_NK = log_probability_NV.topk(min(count, score_NV.shape[1]), dim=-1)
    return [list(zip(tokens, values)) for tokens, values in zip(token_NK.tolist(), values_NK.tolist())]


def _penalise(score_V: Tensor, rules: LogitRules, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
    if rules.repetition_penalty != 1:
        seen_K = torch.tensor(sorted({*prompt_ids, *generated_ids}), dtype=torch.long)
        found_K = score_V[seen_K]
        penalty = rules.repetition_penalty
        score_V[seen_K] = torch.where(found_K > 0, found_K / penalty, found_K * penalty)
    if rules.frequency_penalty or rules.presence_penalty:
        counts = Counter(generated_ids)
        if counts:
            token_K = torch.tensor(list(counts), dtype=torch.long)
            count_K = torch.tensor(list(counts.values()), dtype=score_V.dtype)
            score_V[token_K] -= rules.frequency_penalty * count_K + rules.presence_penalty


def _thought(rules: LogitRules, generated_ids: Sequence[int]) -> int:
    """Tokens of thinking that is still open; -1 when none is."""
    if rules.end_think_id in generated_ids:
        return -1
    if rules.thinks_from_start:
        return len(generated_ids)
    if rules.think_id is not None and rules.think_id in generated_ids:
        return len(generated_ids) - 1 - list(generated_ids).index(rules.think_id)
    return -1
