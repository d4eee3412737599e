"""What is asked of the engine and what it answers: plain values, no tensors, no text.

A request is token ids and sampling parameters. The engine answers with one `TokenEvent` per generated token, so that
streaming, batch generation and reinforcement-learning rollouts are three ways of reading the same events.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from shoal.engine.logit_rules import Constraint, LogitRules
from shoal.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Defaults draw from the model's own distribution."""

    max_tokens: int = 256
    """Generated tokens at most, the stop token included."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int | None = None
    """None draws a fresh one; equal seeds give equal tokens whatever else is in the batch."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends after one of these; it is the last token of the completion."""
    num_samples: int = 1
    """Independent completions of the same prompt; the prompt is computed once."""
    rules: LogitRules | None = None
    """Penalties, biases and budgets; the simple engine has none."""
    constraint: Callable[[], Constraint] | None = None
    """Makes the form that each sample's answer must fit."""
    top_logprobs: int = 0
    """How many of the likeliest tokens every event names."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens={self.max_tokens} must be at least 1.")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 10):
            raise RequestError(f"temperature={self.temperature} must be between 0 (greedy) and 10.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p} must be in (0, 1].")
        if self.top_k < 0:
            raise RequestError(f"top_k={self.top_k} must be 0 (off) or positive.")
        if self.num_samples < 1:
            raise RequestError(f"num_samples={self.num_samples} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to complete."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = ""
    """Whose request it is: waiting tenants are served in turn."""
    priority: int = 0
    """Higher goes first."""
    isolation: str = ""
    """Requests share cached prefixes only with requests of the same isolation."""


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One generated token, or the end without one (`token_id` None: cancelled or failed)."""

    request_id: int
    sample: int
    """Which of the request's `num_samples`."""
    token_id: int | None
    logprob: float
    """Natural log-probability of the token under the distribution it was drawn from (temperature and cuts applied)."""
    finish_reason: FinishReason | None = None
    """Set on the last event of a sample."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, when they were asked for."""
    found_tokens: int = 0
    """Prompt tokens whose latents were found in a cache."""


@dataclass(kw_only=True)
class Completion:
    """All tokens of one sample. `token_ids` ends with the stop token when `finish_reason` is "stop"."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
