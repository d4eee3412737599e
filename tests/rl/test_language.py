import pytest

from shoal.errors import ConfigError
from shoal.rl.language import language_consistency, language_reward


def test_words_of_another_script_lower_the_share():
    assert language_consistency("first add 3 and 4") == 1.0
    assert language_consistency("first сложи 3 and 4") == pytest.approx(2 / 3)
    assert language_consistency("加 and 减", "zh") == pytest.approx(2 / 3)
    assert language_consistency("first 加上", "en") == pytest.approx(1 / 3)
    assert language_consistency("naïve café") == 1.0


def test_a_word_of_two_scripts_is_of_neither():
    assert language_consistency("раssword plain") == 0.5  # the first two letters are Cyrillic


def test_numbers_and_signs_are_of_no_language():
    assert language_consistency("3+4=7 ; 12") is None and language_consistency("") is None


def test_the_reward_reads_the_thinking_alone():
    texts = ["<think>two слова</think><answer>да</answer>", "<think></think><answer>7</answer>", "no format"]
    assert language_reward("en")([""] * 3, texts, [[]] * 3) == [0.5, None, 0.0]


def test_unknown_languages_are_named():
    with pytest.raises(ConfigError, match="language='tlh' is unknown; use one of en, zh"):
        language_reward("tlh")
