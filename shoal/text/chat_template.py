"""Conversations to token ids, without letting what people type become control tokens.

The default template is DeepSeek R1's format. Foreign templates are Jinja programs from strangers: they run only in
`template_sandbox`, with bounded steps, memory and time. And because a template pastes user text between control
tokens, user text that *spells* a control token would become one; `encode` prevents that by rendering with unguessable
placeholders where the contents go and encoding contents as ordinary text afterwards.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import TokenizerError
from shoal.text.template_sandbox import BoundedTemplate
from shoal.text.tokenizer import Tokenizer

DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages if message['role'] == 'system' -%}{{ message['content'] }}{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- if thinking -%}{{ '<think>' }}{%- endif -%}{%- endif -%}"
)
"""System text, then turns; thinking of earlier turns is dropped; the answer may be made to start by thinking."""


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        self._template = BoundedTemplate(source)

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
            TokenizerError: the template refuses the messages, misbehaves, or runs past its limits.
        """
        values: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        values |= {"add_generation_prompt": add_generation_prompt, "thinking": bool(thinking), "tools": None}
        return self._template.render(values)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
    ) -> list[int]:
        """The conversation as token ids; control tokens come from the template alone.

        Contents are replaced by placeholders before rendering and encoded as ordinary text afterwards. Only the thinking of
        assistant turns is cut here rather than by the template, which cannot see it. A template that changes or drops a
        placeholder (trims it, tests its text) loses that message's content; this is said as an error, never passed on.
        """
        nonce = secrets.token_hex(8)
        contents: list[str] = []
        hidden = []
        for message in messages:
            content = str(message.get("content") or "")
            if message.get("role") == "assistant":
                content = content.rpartition("</think>")[2]
            hidden.append({**message, "content": _placeholder(nonce, len(contents))})
            contents.append(content)
        rendered = self.render(hidden, add_generation_prompt=add_generation_prompt, thinking=thinking)
        ids: list[int] = []
        for index, content in enumerate(contents):
            before, found, rendered = rendered.partition(_placeholder(nonce, index))
            if not found:
                raise TokenizerError(
                    f"the chat template dropped or changed message {index + 1}; use another template or role order."
                )
            ids += tokenizer.encode(before, allow_special=True) + tokenizer.encode(content)
        return ids + tokenizer.encode(rendered, allow_special=True)

    def frame(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Token ids before and after the content of a single user turn: `encode` of many one-turn prompts, in one go."""
        nonce = _placeholder(secrets.token_hex(8), 0)
        before, _, after = self.render([{"role": "user", "content": nonce}]).partition(nonce)
        return tokenizer.encode(before, allow_special=True), tokenizer.encode(after, allow_special=True)


def _placeholder(nonce: str, index: int) -> str:
    return f"\ue000{nonce}-{index}\ue001"
