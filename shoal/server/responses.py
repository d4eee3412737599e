"""OpenAI's Responses: the same generation, as items of reasoning, message and function calls.

Answers are kept for `previous_response_id` unless the client says `store: false`: in memory, a bounded number, each known
to its own key alone, gone with the process.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from shoal.errors import RequestError
from shoal.server.access import ANYBODY, Account
from shoal.server.blocks import Block, BlockReader, Change
from shoal.server.events import event
from shoal.server.generation import ServedModel, extras_of
from shoal.server.responses_schemas import ResponsesRequest
from shoal.server.schemas import FunctionCall, Message, ToolCall
from shoal.server.turn import generation_of

MAX_STORED_CHARACTERS = 64 << 20


class ResponseMemory:
    """Conversations by the id of their last answer. Safe to use from many threads."""

    def __init__(self, max_stored: int) -> None:
        self.max_stored = max_stored
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], tuple[list[Message], int]] = OrderedDict()
        self._characters = 0

    def keep(self, account: Account, response_id: str, messages: list[Message]) -> None:
        """Keep a conversation; the oldest go when there are too many."""
        size = sum(len(message.model_dump_json()) for message in messages)
        with self._lock:
            self._kept[(account.name, response_id)] = (messages, size)
            self._characters += size
            while len(self._kept) > self.max_stored or self._characters > MAX_STORED_CHARACTERS:
                self._characters -= self._kept.popitem(last=False)[1][1]

    def recall(self, account: Account, response_id: str) -> list[Message]:
        """The conversation up to an answer.

        Raises:
            RequestError: it is not kept, or belongs to another key.
        """
        with self._lock:
            found = self._kept.get((account.name, response_id))
        if found is None:
            raise RequestError(
                f"previous_response_id={response_id!r} is not kept here (any more); send the conversation as 'input'."
            )
        return list(found[0])


class ResponsesAnswer:
    """One request to `/v1/responses` on its way."""

    def __init__(
        self, served: ServedModel, body: ResponsesRequest, memory: ResponseMemory, account: Account = ANYBODY
    ) -> None:
        self.body, self.memory, self.account = body, memory, account
        earlier = memory.recall(account, body.previous_response_id) if body.previous_response_id else []
        self.conversation = [*earlier, *body.own_messages()]
        self.generation = generation_of(served, body.as_chat(earlier), account, id_prefix="resp_")
        self.sample = self.generation.samples[0]
        self.reader = BlockReader(self.sample)
        self._sequence = 0

    async def whole(self) -> dict[str, Any]:
        """The finished response."""
        async with aclosing(self.generation.steps()) as steps:
            async for step in steps:
                self.reader.read(step.pieces)
        return self._finished()

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events from `response.created` to `response.completed`, `.incomplete` or `.failed`."""
        has_begun = False
        async with aclosing(self.generation.steps()) as steps:
            async for step in steps:
                if not has_begun:
                    has_begun = True
                    yield self._event("response.created", response=self._response("in_progress"))
                    yield self._event("response.in_progress", response=self._response("in_progress"))
                for change in self.reader.read(step.pieces):
                    for item in self._events_of(change):
                        yield item
        for change in self.reader.end():
            for item in self._events_of(change):
                yield item
        finished = self._finished()
        yield self._event(f"response.{finished['status']}", response=finished)

    def failure(self, status: int, message: str, kind: str) -> list[bytes]:
        """How a stream ends that cannot go on."""
        failed = self._response("failed") | {"error": {"code": "server_error", "message": message}}
        return [self._event("response.failed", response=failed)]

    def _finished(self) -> dict[str, Any]:
        status = {"length": "incomplete", "insufficient_system_resource": "failed"}.get(
            self.sample.finish_reason or "", "completed"
        )
        response = self._response(status)
        if status == "failed":
            response["error"] = {"code": "server_error", "message": "the engine failed on this request; try again."}
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if self.body.store is not False:
            self.memory.keep(self.account, self.generation.id, [*self.conversation, self._message()])
        return response

    def _message(self) -> Message:
        """The answer as it stands in the conversation."""
        calls = [
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in self.sample.calls
        ]
        return Message(
            role="assistant",
            content=self.sample.content,
            tool_calls=calls or None,
            reasoning_content=self.sample.reasoning or None,
        )

    def _response(self, status: str) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.generation.id,
            "object": "response",
            "created_at": self.generation.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.generation.served.name,
            "output": [self._item(block, self._state(block)) for block in self.reader.blocks],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": body.reasoning.model_dump() if body.reasoning else {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": self._format()},
            "tool_choice": self._tool_choice(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _format(self) -> dict[str, Any]:
        wanted = self.body.text.format if self.body.text else None
        return wanted.model_dump(by_alias=True, exclude_none=True) if wanted else {"type": "text"}

    def _tool_choice(self) -> Any:
        choice = self.body.tool_choice
        return choice.model_dump() if choice is not None and not isinstance(choice, str) else choice or "auto"

    def _usage(self) -> dict[str, Any]:
        counts = self.generation.counts
        return {
            "input_tokens": counts.prompt_tokens,
            "input_tokens_details": {"cached_tokens": counts.found_tokens},
            "output_tokens": counts.output_tokens,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
            "total_tokens": counts.prompt_tokens + counts.output_tokens,
            **extras_of(counts, self.generation.cost_usd),
        }

    def _state(self, block: Block) -> str:
        """An answer that was cut off left its last item unfinished."""
        was_cut = self.sample.finish_reason not in (None, "stop", "tool_calls")
        return "incomplete" if was_cut and block is self.reader.blocks[-1] else "completed"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item_id = f"{self.generation.id.removeprefix('resp_')}_{block.index}"
        if block.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": block.text}] if block.text else []
            return {"id": "rs_" + item_id, "type": "reasoning", "summary": [], "content": content, "status": status}
        if block.kind == "content":
            content = [_output_text(block.text)] if block.text else []
            head = {"id": "msg_" + item_id, "type": "message", "role": "assistant"}
            return {**head, "content": content, "status": status}
        assert block.call is not None
        call = {"call_id": block.call.id, "name": block.call.name, "arguments": block.text}
        return {"id": "fc_" + item_id, "type": "function_call", **call, "status": status}

    def _events_of(self, change: Change) -> list[bytes]:
        block = change.block
        item = self._item(block, "in_progress" if change.what != "end" else self._state(block))
        place = {"item_id": item["id"], "output_index": block.index}
        if change.what == "begin":
            empty = self._item(Block(block.index, block.kind, call=block.call), "in_progress")
            added = [self._event("response.output_item.added", output_index=block.index, item=empty)]
            if block.kind == "call":
                return added
            return [*added, self._event("response.content_part.added", **place, content_index=0, part=_part(block, ""))]
        if change.what == "grow":
            return [self._grown(block, place, change.text)]
        return [
            *self._done(block, place),
            self._event("response.output_item.done", output_index=block.index, item=item),
        ]

    def _grown(self, block: Block, place: dict[str, Any], text: str) -> bytes:
        if block.kind == "call":
            return self._event("response.function_call_arguments.delta", **place, delta=text)
        if block.kind == "reasoning":
            return self._event("response.reasoning_text.delta", **place, content_index=0, delta=text)
        return self._event("response.output_text.delta", **place, content_index=0, delta=text, logprobs=[])

    def _done(self, block: Block, place: dict[str, Any]) -> list[bytes]:
        if block.kind == "call":
            assert block.call is not None
            called = {"name": block.call.name, "arguments": block.text}
            return [self._event("response.function_call_arguments.done", **place, **called)]
        if block.kind == "reasoning":
            done = self._event("response.reasoning_text.done", **place, content_index=0, text=block.text)
        else:
            done = self._event("response.output_text.done", **place, content_index=0, text=block.text, logprobs=[])
        part = _part(block, block.text)
        return [done, self._event("response.content_part.done", **place, content_index=0, part=part)]

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        self._sequence += 1
        return event({"type": kind, "sequence_number": self._sequence - 1, **fields}, kind)


def _part(block: Block, text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text} if block.kind == "reasoning" else _output_text(text)


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
