"""From the fields of a request to what the engine is told."""

import json
from typing import Any

from shoal.engine.grammar import Form, GrammarConstraint, check_available
from shoal.engine.logit_rules import LogitRules
from shoal.engine.request import SamplingParams
from shoal.errors import RequestError
from shoal.server.generation import ServedModel
from shoal.server.schemas import ChatRequest, ResponseFormat, SamplingFields
from shoal.text.tokenizer import END_THINK, THINK


def sampling_params(
    served: ServedModel,
    body: SamplingFields,
    prompt_tokens: int,
    *,
    max_tokens: int | None = None,
    top_logprobs: int = 0,
    form: Form | None = None,
    thinking_budget: int | None = None,
    thinks_from_start: bool = False,
) -> SamplingParams:
    """What the engine is told.

    Args:
        form: that the answer must fit; thinking before it is free.
    Raises:
        RequestError: the prompt leaves no room for an answer, or a form cannot be used.
    """
    room = served.max_context - prompt_tokens
    if room < 1:
        raise RequestError(
            f"the conversation is {prompt_tokens} tokens long; the model's context of {served.max_context} "
            "leaves no room for an answer. Shorten it."
        )
    wanted = max_tokens or body.max_tokens or served.limits.default_max_tokens
    constraint = None
    if form is not None:
        check_available()
        starts_after = served.tokenizer.token_id(END_THINK) if thinks_from_start else None
        GrammarConstraint(served.tokenizer, form)  # a form that cannot be used is refused here, not in the engine

        def constraint() -> GrammarConstraint:
            return GrammarConstraint(served.tokenizer, form, starts_after=starts_after)

    return SamplingParams(
        max_tokens=min(wanted, room),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=min(max(body.top_k or 0, 0), served.tokenizer.vocab_size),
        seed=None if body.seed is None else body.seed & 0x7FFFFFFFFFFFFFFF,
        num_samples=body.num_samples,
        stop_token_ids=_stop_ids(served, body),
        rules=_rules(served, body, thinking_budget, thinks_from_start),
        constraint=constraint,
        top_logprobs=top_logprobs,
    )


def _stop_ids(served: ServedModel, body: SamplingFields) -> tuple[int, ...]:
    for token in body.stop_token_ids or ():
        if token >= served.tokenizer.vocab_size:
            raise RequestError(
                f"stop_token_ids names token {token}; this model's are 0..{served.tokenizer.vocab_size - 1}."
            )
    return (served.tokenizer.eos_token_id, *(body.stop_token_ids or ()))


def form_of(wanted: ResponseFormat | None) -> Form | None:
    """The form that `response_format` asks for.

    Raises:
        RequestError: the schema, pattern or grammar is missing.
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Form("json_schema", bounded_json({"type": "object"}))
    if wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.json_schema is None:
            raise RequestError("response_format json_schema needs json_schema.schema.")
        return Form("json_schema", bounded_json(wanted.json_schema.json_schema))
    text = wanted.pattern if wanted.type == "regex" else wanted.grammar
    if not text:
        raise RequestError(f"response_format {wanted.type} needs {'pattern' if wanted.type == 'regex' else 'grammar'}.")
    return Form(wanted.type, text)


def bounded_json(schema: dict[str, Any]) -> str:
    """The schema as llguidance reads it, with a bound on blanks: a model that is unsure would write them for ever. Single
    lines and indented ones both fit."""
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": r"\n? {0,20}"}})


def thinking_budget_of(body: ChatRequest, default_max_tokens: int) -> int | None:
    """Tokens of thinking that the request allows; None is no bound. Efforts are shares of what the answer may have."""
    if body.thinking and body.thinking.budget_tokens is not None:
        return body.thinking.budget_tokens
    share = {"minimal": 0.125, "low": 0.25, "medium": 0.5}.get(body.reasoning_effort or "")
    wanted = body.max_completion_tokens or body.max_tokens or default_max_tokens
    return None if share is None else int(wanted * share)


def _rules(
    served: ServedModel, body: SamplingFields, thinking_budget: int | None, thinks_from_start: bool
) -> LogitRules | None:
    rules = LogitRules(
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        min_p=body.min_p or 0.0,
        logit_bias=tuple((_token_id(token), bias) for token, bias in (body.logit_bias or {}).items()),
        min_tokens=body.min_tokens or 0,
        thinking_budget=thinking_budget,
        end_think_id=served.tokenizer.token_id(END_THINK),
        think_id=served.tokenizer.token_id(THINK),
        thinks_from_start=thinks_from_start,
    )
    nothing = LogitRules(
        end_think_id=rules.end_think_id, think_id=rules.think_id, thinks_from_start=rules.thinks_from_start
    )
    return None if rules == nothing else rules


def _token_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise RequestError(f"logit_bias names {text[:20]!r}, which is no token id.")
    return int(text)
