"""Anthropic's Messages: the same generation, in blocks of thinking, text and tool use.

Differs from Anthropic's API: `input_tokens` and the cache's share are known when the prompt has been read, so
`message_start` comes with the first token; the signature of a thinking block says whose it is and proves nothing.
"""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from shoal.errors import ServerError
from shoal.server.access import ANYBODY, Account
from shoal.server.blocks import Block, BlockReader, Change
from shoal.server.events import error_body, event
from shoal.server.generation import ServedModel, extras_of
from shoal.server.messages_schemas import MessagesRequest
from shoal.server.turn import generation_of

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
SIGNATURE = "shoal"


class MessagesAnswer:
    """One request to `/v1/messages` on its way."""

    def __init__(self, served: ServedModel, body: MessagesRequest, account: Account = ANYBODY) -> None:
        self.generation = generation_of(served, body.as_chat(), account, id_prefix="msg_")
        self.sample = self.generation.samples[0]
        self.reader = BlockReader(self.sample)

    async def whole(self) -> dict[str, Any]:
        """The finished message.

        Raises:
            ServerError: the engine failed on it.
        """
        async with aclosing(self.generation.steps()) as steps:
            async for step in steps:
                self.reader.read(step.pieces)
        self._check()
        content = [_content_block(block) for block in self.reader.blocks]
        return {**self._head(), "content": content, **self._stop(), "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events from `message_start` to `message_stop`."""
        has_begun = False
        async with aclosing(self.generation.steps()) as steps:
            async for step in steps:
                if not has_begun:
                    has_begun = True
                    start = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
                    yield _event("message_start", message={**start, "usage": {**self._usage(), "output_tokens": 0}})
                for change in self.reader.read(step.pieces):
                    for item in _events_of(change):
                        yield item
        for change in self.reader.end():
            for item in _events_of(change):
                yield item
        self._check()
        yield _event("message_delta", delta=self._stop(), usage=self._usage())
        yield _event("message_stop")

    def failure(self, status: int, message: str, kind: str) -> list[bytes]:
        """How a stream ends that cannot go on."""
        return [event(error_body(message, kind, path="/v1/messages"), "error")]

    def _check(self) -> None:
        if self.sample.finish_reason not in STOP_REASONS:
            raise ServerError("the engine failed on this request; try again.")

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.generation.id,
            "type": "message",
            "role": "assistant",
            "model": self.generation.served.name,
        }

    def _stop(self) -> dict[str, Any]:
        stopped_by = self.sample.reader.stopped_by
        reason = "stop_sequence" if stopped_by else STOP_REASONS[self.sample.finish_reason or "stop"]
        return {"stop_reason": reason, "stop_sequence": stopped_by}

    def _usage(self) -> dict[str, Any]:
        """As Anthropic counts: what the cache gave is not part of the input."""
        counts = self.generation.counts
        return {
            "input_tokens": counts.miss_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counts.found_tokens,
            "output_tokens": counts.output_tokens,
            **extras_of(counts, self.generation.cost_usd),
        }


def _content_block(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": SIGNATURE}
    if block.kind == "content":
        return {"type": "text", "text": block.text}
    assert block.call is not None
    return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": _input(block.text)}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments as an object, which Anthropic's clients expect even where the model wrote none."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {"_raw": arguments}
    return value if isinstance(value, dict) else {"_raw": arguments}


def _events_of(change: Change) -> list[bytes]:
    block = change.block
    if change.what == "begin":
        empty = _content_block(Block(block.index, block.kind, "", block.call))
        if block.kind == "reasoning":
            empty["signature"] = ""
        return [_event("content_block_start", index=block.index, content_block=empty)]
    if change.what == "grow":
        return [_event("content_block_delta", index=block.index, delta=_delta(block, change.text))]
    signed = {"type": "signature_delta", "signature": SIGNATURE}
    signature = [_event("content_block_delta", index=block.index, delta=signed)] if block.kind == "reasoning" else []
    return [*signature, _event("content_block_stop", index=block.index)]


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    if block.kind == "content":
        return {"type": "text_delta", "text": text}
    return {"type": "input_json_delta", "partial_json": text}


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
