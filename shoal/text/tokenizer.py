"""Text to token ids and back: byte-level BPE with digits kept apart.

Every text survives the round trip, because all 256 bytes are in the vocabulary; digits stay single tokens, so that
arithmetic sees place values (as DeepSeek's pre-tokenizer does for short numbers). Special tokens carry DeepSeek's own
spellings. What a user typed is never turned into a special token unless the caller asks for it: control tokens are the
template's to write.
"""

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from shoal.errors import TokenizerError

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
SPECIAL_TOKENS = (BEGIN, END, PAD, USER, ASSISTANT, THINK, END_THINK, ANSWER, END_ANSWER)

SMALLEST_VOCABULARY = 256
"""One token per byte; special tokens come on top."""


class Tokenizer:
    """A tokenizer with its begin, end and padding tokens. Make one with `train`, `train_bytes` or `load`.

    Threads may share it: nothing changes after it is made.
    """

    def __init__(
        self, raw: RawTokenizer, bos_token: str = BEGIN, eos_token: str = END, pad_token: str | None = PAD
    ) -> None:
        raw.encode_special_tokens = False
        self._raw = raw
        self.bos_token_id = self._required(bos_token)
        self.eos_token_id = self._required(eos_token)
        found = raw.token_to_id(pad_token) if pad_token else None
        self.pad_token_id: int = self.eos_token_id if found is None else found
        self._special_ids = {int(i) for i, token in raw.get_added_tokens_decoder().items() if token.special}
        self._special_of = {
            token.content: int(i) for i, token in raw.get_added_tokens_decoder().items() if token.special
        }
        self._names = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        self._byte_decoder = {character: byte for byte, character in enumerate(_byte_alphabet())}

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> "Tokenizer":
        """Learn merges from `texts` up to `vocab_size` entries, special tokens included.

        Raises:
            TokenizerError: the vocabulary cannot hold all bytes and special tokens, or the texts are empty.
        """
        smallest = SMALLEST_VOCABULARY + len(special_tokens)
        if vocab_size < smallest:
            raise TokenizerError(
                f"vocab_size={vocab_size} is too small; 256 bytes and {len(special_tokens)} special tokens need {smallest}."
            )
        raw = _byte_level_bpe()
        seen = _Counter(texts)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        raw.train_from_iterator(seen, trainer)
        if vocab_size > smallest and not seen.characters:
            raise TokenizerError("there is no text to train a tokenizer on; give at least one non-empty document.")
        return cls(raw)

    @classmethod
    def train_bytes(cls, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> "Tokenizer":
        """One token per byte, nothing merged: the character-level tokenizer for plain English text."""
        return cls.train([], SMALLEST_VOCABULARY + len(special_tokens), special_tokens)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read `tokenizer.json` and, for the names of begin and end, `tokenizer_config.json`.

        Raises:
            TokenizerError: a file is missing or damaged.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"no tokenizer.json in {directory}; a model directory needs one beside its config.json."
            )
        try:
            raw = RawTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for any damage
            raise TokenizerError(f"{path} is damaged ({error}); restore it from where the model came from.") from error
        names = _special_names(directory / "tokenizer_config.json")
        return cls(raw, names.get("bos_token") or BEGIN, names.get("eos_token") or END, names.get("pad_token") or PAD)

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers opens as they are."""
        directory.mkdir(parents=True, exist_ok=True)
        config_path = directory / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
        config |= {name: token for name, token in self._names.items() if token}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        _write(directory / "tokenizer.json", self._raw.to_str(pretty=False))
        _write(config_path, json.dumps(config, ensure_ascii=False, indent=2))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; with `allow_special` the spelling of a special token becomes that token."""
        ids: list[int] = self._encoder(allow_special).encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        encodings = self._encoder(allow_special).encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; special tokens are spelled out unless skipped. Bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self, skip_special=skip_special)
        return "".join(decoder.push(token) for token in ids) + decoder.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes an ordinary token stands for; none for special or unknown ids."""
        if token_id in self._special_ids:
            return b""
        token = self._raw.id_to_token(token_id)
        if token is None:
            return b""
        if all(character in self._byte_decoder for character in token):
            return bytes(self._byte_decoder[character] for character in token)
        return str(token).encode("utf-8")

    def num_bytes(self, token_id: int) -> int:
        """How many UTF-8 bytes of text the token stands for; 0 for special tokens."""
        return len(self.token_bytes(token_id))

    def special_text(self, token_id: int) -> str | None:
        """The spelling of a special token; None for ordinary ones."""
        return self._raw.id_to_token(token_id) if token_id in self._special_ids else None

    def token_id(self, token: str) -> int | None:
        """The id of a token spelled exactly so, or None."""
        found: int | None = self._raw.token_to_id(token)
        return found

    @property
    def special_tokens(self) -> dict[str, int]:
        """Every special token and its id."""
        return dict(self._special_of)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return int(self._raw.get_vocab_size(with_added_tokens=True))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's definition: equal digests encode alike."""
        return hashlib.sha256(self._raw.to_str(pretty=False).encode()).hexdigest()

    def _encoder(self, allow_special: bool) -> RawTokenizer:
        return self._raw if allow_special else self._plain

    @functools.cached_property
    def _plain(self) -> RawTokenizer:
        """A second encoder that takes special tokens for text: switching one between calls would switch it for all threads."""
        plain = RawTokenizer.from_str(self._raw.to_str())
        plain.encode_special_tokens = True
        return plain

    def __getstate__(self) -> dict[str, Any]:
        # The library forgets in copies whether special tokens are text, so copies make their own second encoder.
        return {name: value for name, value in self.__dict__.items() if name != "_plain"}

    def _required(self, token: str) -> int:
        found: int | None = self._raw.token_to_id(token)
        if found is None:
            raise TokenizerError(
                f"the tokenizer has no token {token!r}; name its begin and end tokens in tokenizer_config.json."
            )
        return found


class StreamDecoder:
    """Decodes one token at a time, giving out only text that later tokens cannot change."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that has become final with this token; incomplete characters are held back."""
        special = self.tokenizer.special_text(token_id)
        if special is None:
            return self._utf8.decode(self.tokenizer.token_bytes(token_id))
        before = self.finish()
        return before if self.skip_special else before + special

    def finish(self) -> str:
        """What is still held back; an incomplete character becomes U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _Counter:
    """Passes texts on and counts their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Any:
        for text in self.texts:
            self.characters += len(text)
            yield text


def _byte_level_bpe() -> RawTokenizer:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    return raw


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself when printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _special_names(path: Path) -> dict[str, str]:
    """Begin, end and padding token named by a tokenizer_config.json, in its plain or its object spelling."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} is damaged ({error}); restore it from where the model came from.") from error
    names = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = config.get(name) if isinstance(config, dict) else None
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            names[name] = content
    return names


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
