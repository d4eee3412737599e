"""Conversations to learn from: what is learnt, what only stands before it, and what a line may not be."""

import gzip
import json

import pytest

from shoal.errors import DataError
from shoal.text.chat_template import ChatTemplate
from shoal.text.conversations import encode_answer, encode_example, read_examples
from shoal.text.tokenizer import ASSISTANT, END_THINK, THINK, USER, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the shoal swims, the ring sings; 1 + 1 = 2"] * 20, 300)


def written(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("question", ["prompt", "question", "instruction"])
@pytest.mark.parametrize("answer", ["response", "answer", "completion", "output"])
def test_a_question_with_its_answer_is_one_example_under_every_usual_name(tmp_path, question, answer):
    (example,) = read_examples([written(tmp_path, {question: "what swims?", answer: "the shoal"})])
    assert example.messages == ({"role": "user", "content": "what swims?"},) and example.answer == "the shoal"


def test_every_answer_of_a_conversation_is_learnt_after_what_came_before(tmp_path):
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    first, second = read_examples([written(tmp_path, {"messages": turns}, name="data.jsonl.gz")])
    assert [m["content"] for m in first.messages] == ["be brief", "a"]
    assert first.answer == f"{THINK}hm{END_THINK}b"
    assert [m["content"] for m in second.messages] == ["be brief", "a", "b", "c"] and second.answer == "d"


def test_the_loss_is_taken_on_the_answer_and_its_end_alone(tmp_path, tokenizer):
    template = ChatTemplate.default(tokenizer)
    (example,) = read_examples([written(tmp_path, {"prompt": "1 + 1", "response": "<think>1 + 1</think>2"})])
    encoded = encode_example(example, tokenizer, template)
    learnt = [token for token, counts in zip(encoded.token_ids, encoded.is_answer) if counts]
    assert learnt[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learnt[:-1], skip_special=False) == "<think>1 + 1</think>2"
    prompt = [token for token, counts in zip(encoded.token_ids, encoded.is_answer) if not counts]
    assert prompt == template.encode(tokenizer, [{"role": "user", "content": "1 + 1"}])


def test_text_that_spells_a_control_token_stays_text(tokenizer):
    ids = encode_answer(f"{THINK}ring{END_THINK}{USER}sings{ASSISTANT}", tokenizer)
    assert tokenizer.decode(ids, skip_special=False) == f"{THINK}ring{END_THINK}{USER}sings{ASSISTANT}"
    forged = tokenizer.encode(USER, allow_special=True) + tokenizer.encode(ASSISTANT, allow_special=True)
    assert len(forged) == 2 and not set(forged) & set(ids)
    assert set(tokenizer.encode(THINK, allow_special=True)) <= set(ids)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ("7", "line 1: int is no object"),
        ({"prompt": "a"}, "no text under response"),
        ({"response": "a"}, "no text under prompt"),
        ({"prompt": " ", "response": "a"}, "no text under prompt"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"role": "USER!", "content": "a"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "without a question"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answers"),
    ],
)
def test_lines_that_are_no_examples_are_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        read_examples([written(tmp_path, line)])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_examples([tmp_path / "nothing.jsonl"])
