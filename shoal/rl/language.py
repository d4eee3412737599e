"""R1's third reward: keep to one language while thinking (R1 §2.3.2).

The share of the words in the think block that are written in the target language, added to the other rewards. R1 found
that it costs a little accuracy and makes chains readable. Which language a word is of, is told by its letters: the Unicode
names of a script's letters begin with the script. That tells English from Chinese, Russian or Greek, which is what mixed
chains mix; it cannot tell English from French.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from shoal.errors import ConfigError
from shoal.rl.rewards import Reward
from shoal.rl.tasks.answers import MAX_RESPONSE_CHARS, parse_response

SCRIPTS = {
    "en": ("LATIN",),
    "zh": ("CJK",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "el": ("GREEK",),
    "ar": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
}
"""Scripts of the languages that can be asked for, as Unicode names spell them."""


def language_consistency(text: str, language: str = "en") -> float | None:
    """Share of the words of `text` that are wholly in the language's script; None where there is no word.

    Chinese and Japanese have no spaces: there every character of the script counts as a word. Numbers and signs belong to
    no language and are not counted.
    """
    scripts = _scripts(language)
    words = _words(text[:MAX_RESPONSE_CHARS])
    if not words:
        return None
    return sum(all(_script(letter) in scripts for letter in word) for word in words) / len(words)


def language_reward(language: str = "en") -> Reward:
    """The reward for think blocks in `language`; None where nothing was thought in words, 0 outside the format.

    Raises:
        ConfigError: a language that is not in `SCRIPTS`.
    """
    _scripts(language)

    def language_reward(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        del prompts, completion_ids, columns
        parsed = [parse_response(text) for text in completions]
        return [0.0 if one is None else language_consistency(one.thinking, language) for one in parsed]

    return language_reward


def _scripts(language: str) -> tuple[str, ...]:
    if language not in SCRIPTS:
        raise ConfigError(f"language={language!r} is unknown; use one of {', '.join(SCRIPTS)}.")
    return SCRIPTS[language]


def _words(text: str) -> list[str]:
    """Runs of letters; a letter of a script without spaces is a word of its own."""
    words: list[str] = []
    current: list[str] = []
    for character in [*text, " "]:
        is_alone = character.isalpha() and _script(character) in ("CJK", "HIRAGANA", "KATAKANA")
        if character.isalpha() and not is_alone:
            current.append(character)
            continue
        if current:
            words.append("".join(current))
            current = []
        if is_alone:
            words.append(character)
    return words


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]
