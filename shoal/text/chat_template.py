"""Conversations to token ids, without letting what people type become control tokens.

The default template is DeepSeek R1's format. Foreign templates are Jinja programs from strangers: they run only in
`template_sandbox`, with bounded steps, memory and time. And because a template pastes user text between control
tokens, user text that *spells* a control token would become one; `encode` prevents that by rendering with unguessable
placeholders where the contents go and encoding contents as ordinary text afterwards.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import TokenizerError
from shoal.text.messages import plain_messages
from shoal.text.template_sandbox import BoundedTemplate, JsonText
from shoal.text.tokenizer import Tokenizer
from shoal.text.tools import describe, refuse_marks

DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- set ns = namespace(has_system=false, has_turns=false, in_outputs=false) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{ ('\\n\\n' if ns.has_system and ns.has_turns else '') + message['content'] }}{%- set ns.has_system = true -%}"
    "{%- else -%}{%- set ns.has_turns = true -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ ('<｜tool▁outputs▁end｜>' if ns.in_outputs else '') + '<｜User｜>' + message['content'] }}"
    "{%- set ns.in_outputs = false -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<｜tool▁outputs▁end｜>' if ns.in_outputs else '<｜Assistant｜>' }}"
    "{%- set ns.in_outputs = false -%}"
    "{{ (message['content'] or '').split('</think>')[-1] }}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{ ('<｜tool▁calls▁begin｜>' if loop.first else '\\n') + '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' }}"
    "{{ call['function']['name'] + '\\n```json\\n' + call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}"
    "{{ '<｜tool▁calls▁end｜>' if loop.last else '' }}"
    "{%- endfor -%}"
    "{{ eos_token }}"
    "{%- elif message['role'] == 'tool' -%}"
    "{{ '\\n' if ns.in_outputs else '<｜tool▁outputs▁begin｜>' }}"
    "{{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}{%- set ns.in_outputs = true -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if ns.in_outputs -%}{{ '<｜tool▁outputs▁end｜>' }}"
    "{%- elif add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- if thinking -%}{{ '<think>' }}{%- endif -%}{%- endif -%}"
)
"""The format of DeepSeek-V3 and R1 (their published chat_template).

All system texts stand in front: those before the first turn one after the other, later ones after a blank line. Thinking of
earlier turns is dropped; the answer may be made to start by thinking. Tool calls end the assistant's turn; the answer after
tool outputs follows them without a mark of its own, and is not made to think. Where a tokenizer has no tokens for tools,
their spellings are ordinary text.

Differs from the published template: outputs begin and end anew with each round of calls, also when further calls or a user's
turn follow them; there the published one leaves them open.
"""


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        self._template = BoundedTemplate(source)
        self.reads_tools = re.search(r"\btools\b", source) is not None
        """Whether the template shows tools itself; those of others are told of in the system text."""

    @classmethod
    def default(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """DeepSeek R1's format, with the tokenizer's own begin and end tokens."""
        begin, end = tokenizer.special_text(tokenizer.bos_token_id), tokenizer.special_text(tokenizer.eos_token_id)
        return cls(DEFAULT_TEMPLATE, begin or "", end or "")

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template of a model directory: chat_template.jinja, tokenizer_config.json, or the default when it has none."""
        default = cls.default(tokenizer)
        path = directory / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), default.bos_token, default.eos_token)
        config_path = directory / "tokenizer_config.json"
        if not config_path.is_file():
            return default
        try:
            source = json.loads(config_path.read_text(encoding="utf-8")).get("chat_template")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise TokenizerError(
                f"{config_path} is damaged ({error}); restore it from where the model came from."
            ) from error
        if isinstance(source, list):
            source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
        return cls(source, default.bos_token, default.eos_token) if isinstance(source, str) else default

    def save(self, directory: Path) -> None:
        """Write `chat_template.jinja`, where transformers looks for it."""
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / "chat_template.jinja.tmp"
        temporary.write_text(self.source, encoding="utf-8")
        temporary.replace(directory / "chat_template.jinja")

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, thinking: bool | None = None
    ) -> str:
        """The conversation as text.

        Raises:
            RequestError: messages that are no messages, see `plain_messages`.
            TokenizerError: the template refuses the messages, misbehaves, or runs past its limits.
        """
        return self._render(plain_messages(messages), add_generation_prompt, thinking)

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        values: dict[str, Any] = {"messages": messages, "bos_token": self.bos_token, "eos_token": self.eos_token}
        values |= {"add_generation_prompt": add_generation_prompt, "thinking": bool(thinking)}
        return self._template.render({**values, "tools": list(tools) or None})

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        recall: Callable[[str], Sequence[int] | None] | None = None,
    ) -> list[int]:
        """The conversation as token ids; control tokens come from the template alone.

        Contents and the arguments of tool calls are replaced by placeholders before rendering and encoded as ordinary text
        afterwards, wherever the template puts them. Only the thinking of assistant turns is cut here rather than by the
        template, which cannot see it. A template that changes or drops a placeholder (tests its text, changes its case)
        loses that message's content; this is said as an error, never passed on.

        Args:
            tools: that the model may call, in OpenAI's form.
            recall: the ids that a model wrote a text with, if it did: they may differ from how `tokenizer` cuts the text,
                and then only they find the model's cached state.

        Raises:
            RequestError: messages that are no messages, see `plain_messages`.
            TokenizerError: the template refuses or drops a message, misbehaves, or runs past its limits.
        """
        hidden = _Hidden()
        turns = [hidden.message(message, number) for number, message in enumerate(plain_messages(messages), start=1)]
        if tools and self.reads_tools:
            refuse_marks(tools, tokenizer.special_tokens)
        elif tools:
            turns = _with_system_text(turns, describe(tools, lambda text: hidden.hide(text, 1)))
        rendered = self._render(turns, add_generation_prompt, thinking, tools if self.reads_tools else ())
        pieces = hidden.pattern.split(rendered)
        shown = {int(index) for index in pieces[1::2]}
        for index, number in hidden.owner.items():
            if index not in shown:
                raise TokenizerError(
                    f"the chat template dropped or changed message {number}; use another template or role order."
                )
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            if place % 2 == 0:
                ids += tokenizer.encode(piece, allow_special=True)
                continue
            text = hidden.texts[int(piece)]
            known = recall(text) if recall else None
            ids += tokenizer.encode(text) if known is None else known
        return ids

    def frame(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Token ids before and after the content of a single user turn: `encode` of many one-turn prompts, in one go."""
        hidden = _Hidden()
        rendered = self._render([hidden.message({"role": "user", "content": ""}, 1)], True, None)
        pieces = hidden.pattern.split(rendered)
        if len(pieces) != 3:
            raise TokenizerError("the chat template does not show a user's turn exactly once; use another template.")
        before, _, after = pieces
        return tokenizer.encode(before, allow_special=True), tokenizer.encode(after, allow_special=True)


def _with_system_text(turns: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The turns with more to read in front: at the end of the first system text, or as one."""
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


class _Hidden:
    """Texts from outside, kept away from a template behind unguessable placeholders."""

    def __init__(self) -> None:
        self.nonce = secrets.token_hex(8)
        self.texts: list[str] = []
        self.owner: dict[int, int] = {}
        """Number of the message that each text that must appear is part of."""
        self.pattern = re.compile(f"\ue000{self.nonce}-(\\d+)\ue001")

    def message(self, message: dict[str, Any], number: int) -> dict[str, Any]:
        """The message with placeholders for its texts."""
        hidden = dict(message)
        if message["content"] is not None:
            content = (
                message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
            )
            hidden["content"] = self.hide(content, number)
        if "tool_calls" in message:
            hidden["tool_calls"] = [
                {**call, "function": {**function, "arguments": JsonText(self.hide(function["arguments"], number))}}
                for call in message["tool_calls"]
                for function in [call["function"]]
            ]
        if "reasoning_content" in message:
            hidden["reasoning_content"] = self.hide(message["reasoning_content"], None)
        return hidden

    def hide(self, text: str, number: int | None) -> str:
        """What stands for a text; `number` is None for one that a template may leave out."""
        index = len(self.texts)
        self.texts.append(text)
        if number is not None:
            self.owner[index] = number
        return f"\ue000{self.nonce}-{index}\ue001"
