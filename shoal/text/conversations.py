"""Conversations to learn from: JSON lines with questions and the answers wanted, as tokens of which only answers count.

A line is a conversation in OpenAI's fine-tuning layout, `{"messages": [{"role": "user", "content": ...}, {"role":
"assistant", "content": ..., "reasoning_content": ...}, ...]}`, or one question with its answer, `{"prompt": ...,
"response": ...}` (also `question`/`instruction` and `answer`/`completion`/`output`). Every answer becomes an example of its
own, after the conversation so far as the chat template shows it when the model is asked: with thinking of earlier turns
left out. What people write cannot become a control token; the marks around thinking and answer can, in answers alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import DataError, RequestError
from shoal.text.chat_template import ChatTemplate
from shoal.text.corpus import read_json_lines
from shoal.text.messages import plain_messages
from shoal.text.tokenizer import ANSWER, END_ANSWER, END_THINK, THINK, Tokenizer

PROMPT_KEYS = ("prompt", "question", "instruction")
RESPONSE_KEYS = ("response", "answer", "completion", "output")

_MARKS = re.compile("(" + "|".join(map(re.escape, (THINK, END_THINK, ANSWER, END_ANSWER))) + ")")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One answer to learn, and what it answers."""

    messages: tuple[Mapping[str, Any], ...]
    answer: str
    where: str
    """File and line, for messages."""


@dataclass(frozen=True, kw_only=True)
class EncodedExample:
    """Token ids; the loss is taken where `is_answer`."""

    token_ids: list[int]
    is_answer: list[bool]


def read_examples(paths: Sequence[Path]) -> list[Example]:
    """Every answer of every line, in order.

    Raises:
        DataError: a file or line that cannot be read, or without a question and an answer; no answer in any of them.
    """
    found = [
        example
        for path in paths
        for where, value in read_json_lines(path)
        for example in _examples(_messages_of(value, where), where)
    ]
    if not found:
        raise DataError(f"no answers in {', '.join(map(str, paths))}; give at least one line with an answer to learn.")
    return found


def encode_example(example: Example, tokenizer: Tokenizer, template: ChatTemplate) -> EncodedExample:
    """Prompt as the model will be asked, answer, end token.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    try:
        prompt = template.encode(tokenizer, example.messages)
    except RequestError as error:
        raise DataError(f"{example.where}: {error}") from error
    answer = [*encode_answer(example.answer, tokenizer), tokenizer.eos_token_id]
    return EncodedExample(token_ids=[*prompt, *answer], is_answer=[False] * len(prompt) + [True] * len(answer))


def encode_answer(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of an answer: marks of thinking and answer as themselves, everything else as ordinary text."""
    ids: list[int] = []
    for place, piece in enumerate(_MARKS.split(text)):
        ids += tokenizer.encode(piece, allow_special=place % 2 == 1)
    return ids


def _messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {type(value).__name__} is no object; give messages, or prompt and response.")
    if "messages" not in value:
        question, answer = _named(value, PROMPT_KEYS, where), _named(value, RESPONSE_KEYS, where)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if not isinstance(value["messages"], list):
        raise DataError(f"{where}: messages must be a list of objects with role and content.")
    try:
        return plain_messages(value["messages"])
    except RequestError as error:
        raise DataError(f"{where}: {error}") from error


def _named(value: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    for key in keys:
        if isinstance(value.get(key), str) and value[key].strip():
            return str(value[key])
    raise DataError(f"{where}: no text under {', '.join(keys)}; the line has {', '.join(sorted(value)) or 'nothing'}.")


def _examples(messages: Sequence[Mapping[str, Any]], where: str) -> Iterator[Example]:
    """One example per assistant turn that says something."""
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("content"):
            continue
        if place == 0 or messages[place - 1]["role"] == "assistant":
            raise DataError(f"{where}: message {place + 1} is an answer without a question; begin with role user.")
        thinking = message.get("reasoning_content")
        before = f"{THINK}{thinking}{END_THINK}" if thinking else ""
        yield Example(messages=tuple(messages[:place]), answer=before + message["content"], where=where)
