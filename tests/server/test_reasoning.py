import pytest

from shoal.server.reasoning import AnswerReader
from shoal.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["two and two are four, so the answer is 4"] * 3, 300)


def _read(text: str, *, allow_special: bool = True, **options):
    reader = AnswerReader(TOKENIZER, **options)
    pieces = [piece for token in TOKENIZER.encode(text, allow_special=allow_special) for piece in reader.push(token)]
    pieces += reader.finish()
    joined = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("reasoning", "content")}
    return joined["reasoning"], joined["content"], reader


def test_reasoning_is_split_from_content_and_answer_tags_are_hidden():
    reasoning, content, reader = _read("<think>2+2=4</think><answer>4</answer>")
    assert (reasoning, content) == ("2+2=4", "4")
    assert reader.reasoning_tokens == len(TOKENIZER.encode("2+2=4")) + 2


def test_a_template_that_opened_the_thinking_needs_no_tag():
    assert _read("2+2=4</think>4", starts_thinking=True)[:2] == ("2+2=4", "4")


def test_spelled_tags_are_text():
    text = "<think>no</think><answer>4</answer>"
    assert _read(text, allow_special=False)[:2] == ("", text)


@pytest.mark.parametrize(
    "stop, expected",
    [("four", "two and two are "), ("xyz", "two and two are four, so"), ("so", "two and two are four, ")],
)
def test_stop_strings_never_leak(stop, expected):
    text = "two and two are four, so"
    reader = AnswerReader(TOKENIZER, stop=(stop,))
    shown = ""
    for token in TOKENIZER.encode(text):
        for piece in reader.push(token):
            shown += piece.text
            assert stop not in shown
    shown += "".join(piece.text for piece in reader.finish())
    assert shown == expected and reader.stopped == (stop in text)


def test_a_stop_string_in_the_thinking_does_not_stop():
    assert _read("<think>four</think>4", stop=("four",))[:2] == ("four", "4")
