"""Tools in a prompt: which functions a model may call, and the marks that a call stands between.

Published DeepSeek templates show no tools; their model cards have the caller describe them in the system text instead.
`describe` writes that passage in the form of V3 and R1: marks are control tokens where the tokenizer has them and ordinary
text elsewhere. A template that does read `tools` gets them as they are, once nothing in them spells a control token.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from shoal.errors import RequestError

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
MARKS = (CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END)

ARGUMENTS_BEGIN, ARGUMENTS_END = "\n```json\n", "\n```"
"""The fence around the arguments, after the function's name."""

_INTRODUCTION = f"""## Functions

You may call the functions below. To call some, end your answer with one block of this form and write nothing after it:

{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}NAME{ARGUMENTS_BEGIN}{{"argument": "value"}}{ARGUMENTS_END}{CALL_END}{CALLS_END}

Put one more part from {CALL_BEGIN} to {CALL_END} on a line of its own for each further call. Arguments are JSON that fits the \
function's parameters. The results come back before your next turn.
"""


def describe(tools: Sequence[Mapping[str, Any]], hide: Callable[[str], str]) -> str:
    """The passage that tells a model of its tools.

    Args:
        tools: in OpenAI's form, `{"type": "function", "function": {"name", "description", "parameters"}}`.
        hide: what stands for a text from outside until all is encoded.
    """
    parts = [_INTRODUCTION]
    for tool in tools:
        function = tool["function"]
        described = f"{function['name']}\n{function.get('description') or ''}".strip()
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        parts.append(f"\n### {hide(described)}\n\nParameters: {hide(parameters)}\n")
    return "".join(parts)


def refuse_marks(tools: Sequence[Mapping[str, Any]], special_tokens: Iterable[str]) -> None:
    """Refuse tools that spell a control token.

    Raises:
        RequestError: names the token.
    """
    pattern = re.compile("|".join(re.escape(token) for token in special_tokens if token))
    found = pattern.search(json.dumps(tools, ensure_ascii=False)) if pattern.pattern else None
    if found:
        raise RequestError(f"the tools spell the control token {found.group()!r}; write it differently.")
