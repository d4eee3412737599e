"""The memory of answers: what is remembered, and that it stays within its bound."""

from shoal.server.answers import ENTRY_BYTES, TOKEN_BYTES, AnswerMemory


def test_an_answer_is_recalled_by_its_text():
    memory = AnswerMemory()
    memory.remember("seven", [5, 70_000])
    assert memory.recall("seven") == (5, 70_000) and memory.recall("eight") is None


def test_the_oldest_answers_go_and_a_repeated_one_counts_once():
    memory = AnswerMemory(max_bytes=2 * (ENTRY_BYTES + 10 * TOKEN_BYTES))
    for text in ("a", "a", "b"):
        memory.remember(text, range(10))
    assert memory.recall("a") and memory.recall("b")
    memory.remember("c", range(10))
    assert memory.recall("a") is None and memory.recall("b") and memory.recall("c")


def test_what_can_not_be_kept_is_not():
    memory = AnswerMemory(max_bytes=ENTRY_BYTES + 4 * TOKEN_BYTES)
    memory.remember("long", range(5))
    memory.remember("", range(2))
    assert memory.recall("long") is None and memory.recall("") is None
