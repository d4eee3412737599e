"""Calls that must fit: a grammar for answers whose tools are strict, or where a call is demanded.

The grammar (Lark, for llguidance) spells DeepSeek's form of a call with the functions' names and their parameters as JSON
schemas. Where only the arguments are strict, the answer may be any text, with or without calls at its end.
"""

import json
from collections.abc import Sequence

from shoal.engine.grammar import Form
from shoal.errors import RequestError
from shoal.server.sampling_fields import bounded_json, form_of
from shoal.server.schemas import ChatRequest, NamedTool, Tool
from shoal.text.tokenizer import Tokenizer
from shoal.text.tools import ARGUMENTS_BEGIN, ARGUMENTS_END, CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR


def offered_tools(body: ChatRequest) -> list[Tool]:
    """The tools that the model is told of.

    Raises:
        RequestError: the choice names a tool that is not among them, or demands one where there are none.
    """
    choice, tools = body.tool_choice, body.tools or []
    if choice == "none":
        return []
    if isinstance(choice, NamedTool) and choice.function.name not in {tool.function.name for tool in tools}:
        raise RequestError(f"tool_choice names {choice.function.name!r}, which is not among the tools.")
    if choice == "required" and not tools:
        raise RequestError("tool_choice 'required' needs tools.")
    return tools


def form_of_answer(tokenizer: Tokenizer, body: ChatRequest) -> Form | None:
    """The form that the answer must have, for the sake of `response_format`, of its calls, or of both; None leaves it free.

    Raises:
        RequestError: the two cannot be had together, or a schema, pattern or grammar is missing.
    """
    answer, choice = form_of(body.response_format), body.tool_choice
    tools = offered_tools(body)
    several = body.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        return Form("grammar", "\n".join(["start: calls", *_calls(tokenizer, named, several=False)]))
    if choice == "required":
        return Form("grammar", "\n".join(["start: calls", *_calls(tokenizer, tools, several=several)]))
    if not tools or (answer is None and not any(tool.function.strict for tool in tools)):
        return answer
    head = _text_or_calls(tokenizer) if answer is None else ["start: answer | calls", _rule_of(answer)]
    return Form("grammar", "\n".join([*head, *_calls(tokenizer, tools, several=several)]))


def _text_or_calls(tokenizer: Tokenizer) -> list[str]:
    """Any text, and then perhaps calls. Where the opening mark is no token, text ends where the mark is spelled out."""
    begin = _terminal(tokenizer, CALLS_BEGIN)
    if begin.startswith("<["):
        return ["start: TEXT? calls?", "TEXT: /(?s:.+)/"]
    return [
        "start: PLAIN | opened rest",
        f"opened[suffix={begin}]: /(?s:.*)/",
        f"PLAIN: /(?s:.*)/ & ~/(?s:.*){CALLS_BEGIN}(?s:.*)/",
    ]


def _calls(tokenizer: Tokenizer, tools: Sequence[Tool], *, several: bool) -> list[str]:
    begin, call_begin, separator, call_end, end = (
        _terminal(tokenizer, mark) for mark in (CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END)
    )
    more = ' ("\\n" call)*' if several else ""
    choices = " | ".join(f"tool_{number}" for number in range(len(tools)))
    lines = [f"calls: {begin} rest", f"rest: call{more} {end}"]
    lines.append(f'call: {call_begin} "function" {separator} ({choices}) {call_end}')
    for number, tool in enumerate(tools):
        head, tail = _quoted(tool.function.name + ARGUMENTS_BEGIN), _quoted(ARGUMENTS_END)
        lines.append(f"tool_{number}: {head} arguments_{number} {tail}")
        schema = bounded_json({"type": "object", **(tool.function.parameters or {})})
        lines.append(f"arguments_{number}: %json {schema}")
    return lines


def _rule_of(answer: Form) -> str:
    if answer.kind == "regex":
        return f"answer: /{answer.text.replace('/', chr(92) + '/')}/"
    if answer.kind == "grammar":
        raise RequestError("response_format grammar cannot be combined with tools; set tool_choice to 'none'.")
    return f"answer: %json {answer.text}"


def _terminal(tokenizer: Tokenizer, mark: str) -> str:
    """The mark as the grammar spells it: a token where there is one, else its text."""
    found = tokenizer.token_id(mark)
    return _quoted(mark) if found is None else f"<[{found}]>"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
