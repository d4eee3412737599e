"""Chat completions: a validated request through the engine and back, whole or as server-sent events."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from shoal.engine.request import TokenEvent
from shoal.server.access import ANYBODY, Account
from shoal.server.events import DONE, error_body, event
from shoal.server.generation import Sample, ServedModel, Step
from shoal.server.pieces import Call, Piece
from shoal.server.schemas import ChatRequest
from shoal.server.turn import generation_of


class ChatCompletion:
    """One chat request on its way.

    Raises:
        RequestError: the prompt does not fit the context, or something asked for cannot be.
    """

    def __init__(self, served: ServedModel, body: ChatRequest, account: Account = ANYBODY) -> None:
        self.served, self.body = served, body
        self.generation = generation_of(served, body, account)
        self._named = [0] * body.num_samples
        """Calls of each sample that the client has been told of."""

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
        if self.body.wants_usage_alone:
            head = self.generation.head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": self.generation.usage()})
        yield DONE

    def failure(self, status: int, message: str, kind: str) -> list[bytes]:
        """How a stream ends that cannot go on."""
        return [event(error_body(message, kind)), DONE]

    def _deltas(self, step: Step) -> list[tuple[dict[str, Any], bool]]:
        deltas = [self._delta(step.sample, piece) for piece in step.pieces]
        if step.is_end:
            deltas.append({})
        return [(delta, step.is_end and index == len(deltas) - 1) for index, delta in enumerate(deltas)]

    def _delta(self, sample: int, piece: Piece) -> dict[str, Any]:
        if piece.kind == "reasoning":
            return {"reasoning_content": piece.text}
        if piece.kind == "content":
            return {"content": piece.text}
        if piece.kind == "call":
            call = self.generation.samples[sample].calls[self._named[sample]]
            self._named[sample] += 1
            return {"tool_calls": [{"index": self._named[sample] - 1, **_tool_call(call, arguments="")}]}
        return {"tool_calls": [{"index": self._named[sample] - 1, "function": {"arguments": piece.text}}]}

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
        message: dict[str, Any] = {
            "role": "assistant",
            "content": sample.content,
            "reasoning_content": sample.reasoning or None,
        }
        if sample.calls:
            message["tool_calls"] = [_tool_call(call, arguments=call.arguments) for call in sample.calls]
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


def _tool_call(call: Call, *, arguments: str) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
