from fractions import Fraction

import pytest

from shoal.errors import DataError
from shoal.rl.tasks.answers import parse_number
from shoal.rl.tasks.jsonl import is_same_answer, read_problems


def _read(tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    return read_problems(path)


def test_gsm8k_lines_become_problems_with_their_work(tmp_path):
    line = '{"question": "How many?", "answer": "Half is 48/2 = <<48/2=24>>24.\\nThen 24+48 = <<24+48=72>>72.\\n#### 1,072"}'
    (problem,) = _read(tmp_path, line + "\n\n")
    assert (problem.prompt, problem.answer) == ("How many?", "1,072")
    assert problem.facts["worked"] == "Half is 48/2 = 24.\nThen 24+48 = 72."


def test_other_names_and_numbers_are_read_too(tmp_path):
    found = _read(tmp_path, '{"prompt": "a", "answer": 7}\n{"problem": "b", "solution": "blue"}')
    assert [(p.prompt, p.answer, p.facts) for p in found] == [("a", "7", {}), ("b", "blue", {})]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no problems"),
        ('{"question": "q", "answer": "1"}\n{', "line 2 is no JSON"),
        ("[1]", "line 1 is no JSON object"),
        ('{"question": "q"}', r"line 1 has no text under 'answer' or 'solution'; it has \['question'\]"),
        ('{"question": " ", "answer": "1"}', "line 1 has no text under 'question'"),
        ('{"question": "q", "answer": "x ####  "}', "empty answer"),
        ("[" * 100_000, "line 1 is no JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        _read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        read_problems(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "text, value",
    [
        ("18", 18),
        ("-3", -3),
        ("$1,234.50", Fraction(2469, 2)),
        ("0.1", Fraction(1, 10)),
        ("3/4", Fraction(3, 4)),
        ("50%", Fraction(1, 2)),
        ("12.", 12),
        ("1000000", 1_000_000),
        ("0.30000000000000004", Fraction(30000000000000004, 10**17)),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "1,00", "1,0000", "one", "1e3", "1/0", "1.5/2", "٣", "1 2", "--1", "9" * 50, "1_0"]
)
def test_what_is_no_number_is_none(text):
    assert parse_number(text) is None


def test_answers_are_equal_as_numbers_or_as_words():
    assert (
        is_same_answer("1,000", "1000.0") and is_same_answer("0.1", "1/10") and is_same_answer("Blue  sky", "blue sky")
    )
    assert not is_same_answer("0.1", "0.10000000000000001") and not is_same_answer("1000", "1000 apples")
    assert not is_same_answer("blue", "x" * 10_000_000)
