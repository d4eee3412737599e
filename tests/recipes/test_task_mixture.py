import random
import re
from collections import Counter

import pytest

from shoal.errors import ConfigError
from shoal.recipes.bundled import SHARES
from shoal.recipes.document_training import train_tokenizer, write_documents
from shoal.recipes.fine_steps import fine_steps
from shoal.recipes.phrasings import rephrase
from shoal.recipes.small_talk import ABILITIES, EXAMPLES, small_talk
from shoal.recipes.task_mixture import MixtureConfig, Share, write_mixture
from shoal.rl.rewards import is_right
from shoal.rl.tasks import TASKS
from shoal.rl.tasks.answers import parse_response
from shoal.text.chat_template import ChatTemplate
from shoal.text.shards import Shards

DOCUMENTS = list(write_mixture(MixtureConfig(shares=SHARES, documents=600)))


@pytest.mark.parametrize("family", sorted(TASKS))
def test_another_wording_keeps_every_number_in_order(family):
    rng = random.Random(0)
    for _ in range(60):
        problem = TASKS[family].generate(rng, TASKS[family].default_difficulty)
        assert re.findall(r"\d+", rephrase(problem, rng)) == re.findall(r"\d+", problem.prompt)


def test_wordings_differ_and_the_original_is_among_them():
    rng = random.Random(1)
    problem = TASKS["addition"].generate(rng, 2)
    said = {rephrase(problem, rng) for _ in range(400)}
    assert problem.prompt in said and len(said) > 10


@pytest.mark.parametrize("share", SHARES, ids=lambda share: share.family)
def test_every_problem_is_worked_out_and_right(share):
    rng = random.Random(2)
    task = TASKS[share.family]
    for difficulty in share.difficulties * 20:
        problem = task.generate(rng, difficulty)
        work, answer = fine_steps(task, problem)
        assert is_right(problem, f"<think>{work}</think><answer>{answer}</answer>")
        for left, sign, right, result in re.findall(r"(\d+)([-+*])(\d+)=(-?\d+)", work):
            made = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert made[sign] == int(result)


def test_the_mixture_shows_work_with_every_problem():
    solved = [parse_response(document.response) for document in DOCUMENTS if document.question]
    assert all(parsed.thinking for parsed in solved if parsed)


def test_the_same_config_gives_the_same_text_and_another_seed_another():
    again = list(write_mixture(MixtureConfig(shares=SHARES, documents=600)))
    assert again == DOCUMENTS
    assert list(write_mixture(MixtureConfig(shares=SHARES, documents=600, seed=1))) != DOCUMENTS


def test_small_talk_says_what_the_model_can_do_and_its_examples_are_of_the_families():
    rng = random.Random(3)
    for _ in range(200):
        _, reply = small_talk(rng)
        assert ABILITIES in reply or any(example in reply for example in EXAMPLES)
    questions = Counter(small_talk(rng)[0] for _ in range(2000))
    assert len(questions) > 1000


def test_history_is_what_a_client_sends_back_and_carries_no_loss(tmp_path):
    with_history = [document for document in DOCUMENTS if document.history]
    assert 20 < len(with_history) < 200
    assert not any("<" in answer for document in with_history for _, answer in document.history)
    tokenizer = train_tokenizer(DOCUMENTS, 400)
    template = ChatTemplate.default(tokenizer)
    document = with_history[0]
    num_tokens = write_documents(tmp_path / "shards", [document], tokenizer, template)
    response = tokenizer.encode(document.response, allow_special=True)
    shards = Shards.open(tmp_path / "shards", expected_digest=tokenizer.digest)
    assert shards.document_lengths().tolist() == [num_tokens]
    tokens, is_label = shards.document(0)
    assert is_label.sum() == len(response) + 1
    assert tokens[is_label].tolist() == [*response, tokenizer.eos_token_id]


def test_impossible_shares_are_named():
    with pytest.raises(ConfigError, match="juggling"):
        Share(family="juggling", difficulties=(1,), weight=1)
    with pytest.raises(ConfigError, match=r"2\.\.7"):
        Share(family="chain_sum", difficulties=(9,), weight=1)


def test_some_sums_have_a_shorter_second_number():
    asked = [re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", document.question or "") for document in DOCUMENTS]
    pairs = [(len(found[1]), len(found[3])) for found in asked if found]
    assert {first > second for first, second in pairs} == {True, False} and all(a >= b for a, b in pairs)
