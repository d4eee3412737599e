"""Chat completions: a validated request through the engine and back, whole or as server-sent events."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from shoal.engine.request import Request, TokenEvent
from shoal.errors import RequestError
from shoal.server.access import ANYBODY, Account
from shoal.server.generation import Generation, Sample, ServedModel, Step
from shoal.server.reasoning import AnswerReader
from shoal.server.sampling_fields import form_of, sampling_params, thinking_budget_of
from shoal.server.schemas import ChatRequest
from shoal.text.tokenizer import THINK


class ChatCompletion:
    """One chat request on its way.

    Raises:
        RequestError: the prompt does not fit the context, or something asked for cannot be.
    """

    def __init__(self, served: ServedModel, body: ChatRequest, account: Account = ANYBODY) -> None:
        self.served, self.body = served, body
        prompt_ids, opened = self._prompt()
        sampling = sampling_params(
            served,
            body,
            len(prompt_ids),
            max_tokens=body.max_completion_tokens,
            top_logprobs=body.top_logprobs if body.logprobs else 0,
            form=form_of(body.response_format),
            thinking_budget=thinking_budget_of(body),
            thinks_from_start=opened,
        )
        isolation = account.name + "/" + (body.user_id or "")
        request = Request(
            prompt_ids=prompt_ids, sampling=sampling, tenant=isolation, priority=body.priority, isolation=isolation
        )
        readers = [AnswerReader(served.tokenizer, starts_thinking=opened, stop=tuple(body.stop)) for _ in range(body.n)]
        self.generation = Generation(served, request, readers, account=account, keep_logprobs=body.logprobs)

    def _prompt(self) -> tuple[tuple[int, ...], bool]:
        """The conversation as token ids, and whether they end inside the thinking. A last message with `prefix` is the
        beginning of the answer (DeepSeek's beta)."""
        served, body = self.served, self.body
        messages = [message.for_template() for message in body.messages]
        prefix = body.messages[-1] if body.messages[-1].prefix else None
        if prefix is not None and (prefix.role != "assistant" or len(messages) == 1):
            raise RequestError("prefix=true belongs to a last message of the role assistant, after at least one other.")
        ids = served.template.encode(
            served.tokenizer,
            messages[:-1] if prefix else messages,
            thinking=False if prefix else wants_thinking(body),
            recall=served.answers.recall,
        )
        if prefix is not None:
            if not isinstance(prefix.content, str):
                raise RequestError("a message with prefix=true needs its content as a string.")
            ids = [*ids, *served.tokenizer.encode(prefix.content)]
        return tuple(ids), ids[-1] == served.tokenizer.token_id(THINK)

    async def whole(self) -> dict[str, Any]:
        """The finished completion."""
        async with aclosing(self.generation.steps()) as steps:
            async for _ in steps:
                pass
        choices = [self._choice(index, sample) for index, sample in enumerate(self.generation.samples)]
        return {**self.generation.head("chat.completion"), "choices": choices, "usage": self.generation.usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, ending with [DONE]. The last chunk of the last sample carries the usage, as DeepSeek's does;
        with `include_usage` it comes once more alone, as OpenAI's clients expect."""
        started: set[int] = set()
        async with aclosing(self.generation.steps()) as steps:
            async for step in steps:
                for delta, is_last in self._deltas(step):
                    if step.sample not in started:
                        delta = {"role": "assistant", "content": "", **delta}
                        started.add(step.sample)
                    yield self._chunk(step, delta, is_last)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield event(
                {**self.generation.head("chat.completion.chunk"), "choices": [], "usage": self.generation.usage()}
            )
        yield DONE

    def _deltas(self, step: Step) -> list[tuple[dict[str, Any], bool]]:
        deltas = [
            {"reasoning_content" if piece.kind == "reasoning" else "content": piece.text} for piece in step.pieces
        ]
        if step.is_end:
            deltas.append({})
        return [(delta, step.is_end and index == len(deltas) - 1) for index, delta in enumerate(deltas)]

    def _chunk(self, step: Step, delta: dict[str, Any], is_last: bool) -> bytes:
        sample = self.generation.samples[step.sample]
        choice = {
            "index": step.sample,
            "delta": delta,
            "logprobs": self._logprobs([step.event]) if "content" in delta and step.event in sample.logprobs else None,
            "finish_reason": sample.finish_reason if is_last else None,
        }
        chunk = {**self.generation.head("chat.completion.chunk"), "choices": [choice]}
        if is_last and all(other.finish_reason for other in self.generation.samples):
            chunk["usage"] = self.generation.usage()
        return event(chunk)

    def _choice(self, index: int, sample: Sample) -> dict[str, Any]:
        message = {"role": "assistant", "content": sample.content, "reasoning_content": sample.reasoning or None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(sample.logprobs) if self.body.logprobs else None,
            "finish_reason": sample.finish_reason,
        }

    def _logprobs(self, events: list[TokenEvent]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": [self._token_logprob(one) for one in events if one.token_id is not None], "refusal": None}

    def _token_logprob(self, one: TokenEvent) -> dict[str, Any]:
        assert one.token_id is not None
        top = [self._token(token_id, logprob) for token_id, logprob in one.top]
        return {**self._token(one.token_id, one.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.served.tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def wants_thinking(body: ChatRequest) -> bool | None:
    """Whether the template should open the thinking; None leaves it to the template."""
    if body.thinking:
        return body.thinking.type == "enabled"
    return None if body.reasoning_effort is None else body.reasoning_effort != "none"


DONE = b"data: [DONE]\n\n"


def event(payload: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    prefix = b"" if name is None else f"event: {name}\n".encode()
    return prefix + b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
