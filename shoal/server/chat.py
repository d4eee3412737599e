"""Chat completions: a validated request through the engine and back, whole or as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from shoal.engine.request import Request, SamplingParams
from shoal.errors import RequestError
from shoal.server.reasoning import AnswerReader, Piece
from shoal.server.schemas import ChatRequest
from shoal.server.worker import EngineWorker
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import THINK, Tokenizer

DEFAULT_MAX_TOKENS = 4096
MAX_STOP_STRINGS = 16


@dataclass(kw_only=True)
class ServedModel:
    """A model with everything the server says about it."""

    name: str
    worker: EngineWorker
    tokenizer: Tokenizer
    template: ChatTemplate
    max_context: int
    description: str = ""
    suggestions: list[str] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class _Answer:
    """One sample as it grows."""

    reader: AnswerReader
    reasoning: str = ""
    content: str = ""
    tokens: int = 0
    finish_reason: str | None = None


class ChatCompletion:
    """One chat request on its way.

    Raises:
        RequestError: the prompt does not fit the context, or too many stop strings.
    """

    def __init__(self, served: ServedModel, body: ChatRequest) -> None:
        self.served, self.body = served, body
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        thinking = body.thinking.type == "enabled" if body.thinking else None
        messages = [{"role": message.role, "content": message.text()} for message in body.messages]
        self.prompt_ids = tuple(served.template.encode(served.tokenizer, messages, thinking=thinking))
        self.stop = body.stop_strings()
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"{len(self.stop)} stop strings given; at most {MAX_STOP_STRINGS} are allowed.")
        self.request = Request(prompt_ids=self.prompt_ids, sampling=self._sampling())
        opened = self.prompt_ids[-1] == served.tokenizer.token_id(THINK)
        self.answers = [
            _Answer(AnswerReader(served.tokenizer, starts_thinking=opened, stop=self.stop)) for _ in range(body.n)
        ]

    def _sampling(self) -> SamplingParams:
        body, room = self.body, self.served.max_context - len(self.prompt_ids)
        if room < 1:
            raise RequestError(
                f"the conversation is {len(self.prompt_ids)} tokens long; the model's context of {self.served.max_context} "
                "leaves no room for an answer. Shorten it."
            )
        wanted = body.max_completion_tokens or body.max_tokens or DEFAULT_MAX_TOKENS
        return SamplingParams(
            max_tokens=min(wanted, room),
            temperature=body.temperature,
            top_p=body.top_p,
            seed=None if body.seed is None else body.seed & 0x7FFFFFFFFFFFFFFF,
            num_samples=body.n,
            stop_token_ids=(self.served.tokenizer.eos_token_id,),
        )

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """Text of each sample as it comes; None marks a sample's end."""
        async for event in self.served.worker.stream(self.request):
            answer = self.answers[event.sample]
            if answer.finish_reason is not None:
                continue
            found: list[Piece] = []
            if event.token_id is not None:
                answer.tokens += 1
                found = answer.reader.push(event.token_id)
            if event.finish_reason is not None:
                found += answer.reader.finish()
                answer.finish_reason = {"stop": "stop", "length": "length"}.get(
                    event.finish_reason, "insufficient_system_resource"
                )
            elif answer.reader.stopped:
                answer.finish_reason = "stop"
            for piece in found:
                if piece.kind == "reasoning":
                    answer.reasoning += piece.text
                else:
                    answer.content += piece.text
                yield event.sample, piece
            if answer.finish_reason is not None:
                yield event.sample, None
                if all(other.finish_reason for other in self.answers):
                    return

    async def whole(self) -> dict[str, Any]:
        """The finished completion."""
        async for _ in self.pieces():
            pass
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": answer.content,
                    "reasoning_content": answer.reasoning or None,
                },
                "logprobs": None,
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(self.answers)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, ending with [DONE]; an error after the start is an event too, so a stream always ends."""
        started: set[int] = set()
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        async for sample, piece in self.pieces():
            delta: dict[str, Any] = {} if sample in started else {"role": "assistant"}
            started.add(sample)
            if piece is not None:
                delta["reasoning_content" if piece.kind == "reasoning" else "content"] = piece.text
            reason = self.answers[sample].finish_reason if piece is None else None
            choice = {"index": sample, "delta": delta, "logprobs": None, "finish_reason": reason}
            yield _event({**self._head("chat.completion.chunk"), "choices": [choice]})
        if with_usage:
            yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"

    def usage(self) -> dict[str, Any]:
        """Token counts in OpenAI's and DeepSeek's fields. There is no prefix cache yet: every prompt token is a miss."""
        completion = sum(answer.tokens for answer in self.answers)
        return {
            "prompt_tokens": len(self.prompt_ids),
            "completion_tokens": completion,
            "total_tokens": len(self.prompt_ids) + completion,
            "prompt_cache_hit_tokens": 0,
            "prompt_cache_miss_tokens": len(self.prompt_ids),
            "completion_tokens_details": {
                "reasoning_tokens": sum(answer.reader.reasoning_tokens for answer in self.answers)
            },
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": f"fp_{self.served.tokenizer.digest[:10]}",
        }


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
