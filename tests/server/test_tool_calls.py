"""Calls out of text, and calls that must fit: by hand-written texts, whatever the cuts between them."""

import random

import pytest

from shoal.engine.grammar import GrammarConstraint
from shoal.errors import RequestError
from shoal.server.reasoning import AnswerReader
from shoal.server.schemas import ChatRequest
from shoal.server.tool_calls import CallReader
from shoal.server.tool_forms import form_of_answer, offered_tools
from shoal.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from shoal.text.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, MARKS, SEPARATOR

WITH_TOKENS = Tokenizer.train_bytes((*SPECIAL_TOKENS, *MARKS))
WITHOUT_TOKENS = Tokenizer.train_bytes()
BOTH = pytest.mark.parametrize("tokenizer", [WITH_TOKENS, WITHOUT_TOKENS], ids=["tokens", "text"])


def r1(name, arguments):
    return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


def v31(name, arguments):
    return f"{CALL_BEGIN}{name}{SEPARATOR}{arguments}{CALL_END}"


def block(*calls, between=""):
    return CALLS_BEGIN + between.join(calls) + CALLS_END


def read(tokenizer, text, **options):
    """What a client puts together from the pieces of a text."""
    reader = AnswerReader(tokenizer, reads_calls=True, **options)
    reasoning, content, calls = "", "", []
    pieces = [piece for token in tokenizer.encode(text, allow_special=True) for piece in reader.push(token)]
    for piece in [*pieces, *reader.finish()]:
        if piece.kind == "call":
            calls.append([piece.text, ""])
        elif piece.kind == "arguments":
            calls[-1][1] += piece.text
        elif piece.kind == "content":
            content += piece.text
        else:
            reasoning += piece.text
    return reasoning, content, [tuple(call) for call in calls]


@BOTH
@pytest.mark.parametrize(
    "text, content, calls",
    [
        ("two", "two", []),
        ("Look. " + block(r1("sun", '{"a": 1}')), "Look. ", [("sun", '{"a": 1}')]),
        (
            block(r1("sun", "{}"), r1("rain", '{"b": "`x`\\n"}'), between="\n"),
            "",
            [("sun", "{}"), ("rain", '{"b": "`x`\\n"}')],
        ),
        (block(v31("sun", '{"a": [1, 2]}'), v31("rain", "{}")), "", [("sun", '{"a": [1, 2]}'), ("rain", "{}")]),
        (block(r1("sun", '{\n  "a": 1\n}')), "", [("sun", '{\n  "a": 1\n}')]),
        ("x" + block(r1("sun", "{}")) + "y", "xy", [("sun", "{}")]),
        (CALLS_BEGIN + CALL_BEGIN + "function" + SEPARATOR + 'sun\n```json\n{"a": ', "", [("sun", '{"a":')]),
        (CALLS_BEGIN + CALL_BEGIN + "func", CALLS_BEGIN + CALL_BEGIN + "func", []),
        (block(CALL_BEGIN + "nonsense" + CALL_END), CALLS_BEGIN + CALL_BEGIN + "nonsense" + CALL_END, []),
        ("a <｜tool▁calls▁x", "a <｜tool▁calls▁x", []),
    ],
)
def test_calls_are_read_in_both_published_forms(tokenizer, text, content, calls):
    assert read(tokenizer, text) == ("", content, calls)


def test_a_spelled_mark_calls_nothing_where_marks_are_tokens():
    reader = AnswerReader(WITH_TOKENS, reads_calls=True)
    text = block(r1("sun", "{}"))
    pieces = [piece for token in WITH_TOKENS.encode(text) for piece in reader.push(token)] + reader.finish()
    assert {piece.kind for piece in pieces} == {"content"}
    assert "".join(piece.text for piece in pieces) == text


def test_calling_ends_the_thinking_and_stop_strings_do_not_reach_into_arguments():
    text = "<think>hm" + block(r1("sun", '{"a": "END"}'))
    assert read(WITH_TOKENS, text, stop=("END",)) == ("hm", "", [("sun", '{"a": "END"}')])


def test_any_cut_of_a_text_gives_the_same_calls():
    text = "Well " + block(r1("sun", '{"a": 1}'), r1("rain", '{"b": "```"}'), between="\n") + " done"
    rng = random.Random(0)
    for _ in range(200):
        reader, pieces, rest = CallReader(in_text=True), [], text
        while rest:
            size = rng.randint(1, 12)
            pieces += reader.text(rest[:size])
            rest = rest[size:]
        pieces += reader.finish()
        told = [
            "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("content", "call", "arguments")
        ]
        assert told == ["Well  done", "sunrain", '{"a": 1}{"b": "```"}']


CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]


def body_with(**fields):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **fields})


def accepts(tokenizer, body, text):
    """Whether the form lets a model write this text and then end."""
    constraint = GrammarConstraint(tokenizer, form_of_answer(tokenizer, body))
    for token in [*tokenizer.encode(text, allow_special=True), tokenizer.eos_token_id]:
        if not constraint.mask()[token]:
            return False
        constraint.advance(token)
    return True


@BOTH
def test_strict_arguments_must_fit_and_free_text_may_come_before_them(tokenizer):
    body = body_with()
    good, bad = r1("weather", '{"city": "Oslo"}'), r1("weather", '{"city": "Bonn"}')
    for text in ("Hello there.", "Let me look. " + block(good), block(good, r1("now", "{}"), between="\n")):
        assert accepts(tokenizer, body, text), text
    for text in (block(bad), block(r1("unknown", "{}")), block(good, bad, between="\n"), CALLS_BEGIN + good):
        assert not accepts(tokenizer, body, text), text


@BOTH
def test_a_choice_demands_a_call(tokenizer):
    weather, now = block(r1("weather", '{"city": "Rome"}')), block(r1("now", "{}"))
    required = body_with(tool_choice="required")
    named = body_with(tool_choice={"type": "function", "function": {"name": "now"}})
    single = body_with(tool_choice="required", parallel_tool_calls=False)
    both = block(r1("now", "{}"), r1("now", "{}"), between="\n")
    for body, yes, no in [
        (required, [weather, now, both], ["hi"]),
        (named, [now], [weather, both]),
        (single, [now], [both]),
    ]:
        assert all(accepts(tokenizer, body, text) for text in yes)
        assert not any(accepts(tokenizer, body, text) for text in no)


@BOTH
def test_an_answer_in_a_form_and_calls_can_be_had_together(tokenizer):
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = body_with(response_format=form)
    assert accepts(tokenizer, body, '{"n":1}') and accepts(tokenizer, body, block(r1("now", "{}")))
    assert not accepts(tokenizer, body, '{"n":2}') and not accepts(tokenizer, body, "hi")
    pattern = body_with(response_format={"type": "regex", "pattern": "a/b+"})
    assert accepts(tokenizer, pattern, "a/bb") and not accepts(tokenizer, pattern, "ab")


def test_impossible_choices_are_refused():
    for fields, part in [
        ({"tool_choice": {"type": "function", "function": {"name": "sun"}}}, "not among the tools"),
        ({"tool_choice": "required", "tools": []}, "needs tools"),
        ({"response_format": {"type": "grammar", "grammar": 'start: "x"'}}, "cannot be combined"),
    ]:
        with pytest.raises(RequestError, match=part):
            form_of_answer(WITH_TOKENS, body_with(**fields))
    assert offered_tools(body_with(tool_choice="none")) == []


def test_blanks_in_arguments_are_bounded_and_indented_json_fits():
    body = body_with(tool_choice="required")
    assert accepts(WITH_TOKENS, body, block(r1("weather", '{\n  "city": "Oslo"\n}')))
    assert not accepts(WITH_TOKENS, body, block(r1("weather", '{"city":' + " " * 40 + '"Oslo"}')))
