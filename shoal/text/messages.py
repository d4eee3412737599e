"""Messages as chat templates take them, from messages as the clients of OpenAI's and DeepSeek's interfaces send them.

Clients may send the content as text, as a list of parts, or not at all beside tool calls; may say `developer` for `system`;
and may add fields. A template is a program that pastes what it finds between control tokens, so only what is known goes on
to it, and short names (role, function, identifiers) only in characters that spell no control token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.errors import RequestError
from shoal.text.template_sandbox import JsonText

ROLE = re.compile(r"[a-z_]{1,32}")
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,256}")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every message with `role` and `content` (text; None beside tool calls alone), and what else it has of `tool_calls`,
    `tool_call_id`, `name`, `reasoning_content` and values that are no text. `developer` becomes `system`.

    Raises:
        RequestError: a message without role, with content that is no text, or with broken tool calls.
    """
    return [_plain_message(message, f"message {number}") for number, message in enumerate(messages, start=1)]


def _plain_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not (isinstance(role, str) and ROLE.fullmatch(role)):
        raise RequestError(f"{where}: role={role!r}; use system, developer, user, assistant or tool.")
    plain: dict[str, Any] = {
        name: value
        for name, value in message.items()
        if isinstance(value, (bool, int, float)) and ROLE.fullmatch(str(name))
    }
    plain |= {"role": "system" if role == "developer" else role, "content": _text(message.get("content"), where)}
    for name in ("name", "tool_call_id"):
        if message.get(name):
            plain[name] = _name(message[name], f"{where}: {name}")
    if isinstance(message.get("reasoning_content"), str):
        plain["reasoning_content"] = message["reasoning_content"]
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(f"{where}: tool_calls must be a list, and belong to the role assistant.")
        plain["tool_calls"] = [_tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls, start=1)]
        plain["content"] = plain["content"] or None
    return plain


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{where}: content is {type(content).__name__}; use text or a list of text parts.")
    texts = []
    for number, part in enumerate(content, start=1):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise RequestError(
                f"{where}, part {number}: type {str(kind)[:50]!r}; this model reads text alone, "
                'send parts like {"type": "text", "text": "..."}.'
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}, part {number}: a part of type 'text' needs a text under 'text'.")
        texts.append(part["text"])
    return "".join(texts)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise RequestError(
            f'{where}: use {{"id": ..., "type": "function", "function": {{"name": ..., "arguments": ...}}}}.'
        )
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise RequestError(f"{where}: arguments must be JSON as text, not {type(arguments).__name__}.")
    plain = {
        "type": "function",
        "function": {"name": _name(function.get("name"), f"{where}: name"), "arguments": JsonText(arguments)},
    }
    return {**plain, "id": _name(call["id"], f"{where}: id")} if call.get("id") else plain


def _name(value: Any, where: str) -> str:
    if not (isinstance(value, str) and NAME.fullmatch(value)):
        raise RequestError(f"{where} is {str(value)[:50]!r}; use 1 to 256 letters, digits and . : _ -")
    return value
