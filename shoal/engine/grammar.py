"""Answers that fit a form: JSON, a JSON schema, a regular expression, a Lark grammar, by masking what cannot come next.

llguidance (github.com/guidance-ai/llguidance, Rust) does the matching: it keeps an Earley parser over bytes and answers,
for every state, which tokens go on. The form comes from a request and is untrusted: its size, its cost to compile and the
cost of each step are bounded, and what is too expensive is refused with the reason.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.errors import RequestError
from shoal.text.tokenizer import Tokenizer

MAX_FORM_CHARACTERS = 1 << 16
FormKind = Literal["json_object", "json_schema", "regex", "grammar"]


@dataclass(frozen=True)
class Form:
    """What an answer must look like; `text` is the schema, expression or grammar."""

    kind: FormKind
    text: str = ""

    def __post_init__(self) -> None:
        if len(self.text) > MAX_FORM_CHARACTERS:
            raise RequestError(
                f"the {self.kind} has {len(self.text)} characters; at most {MAX_FORM_CHARACTERS} are taken."
            )


class GrammarConstraint:
    """The state of one sample's answer. Start of thinking, when there is any, is left free: see `starts_after`.

    Args:
        starts_after: the token after which the form begins (`</think>`); None begins at once.
    """

    def __init__(self, tokenizer: Tokenizer, form: Form, *, starts_after: int | None = None) -> None:
        import llguidance

        vocabulary = _vocabulary(tokenizer)
        self._matcher = llguidance.LLMatcher(vocabulary, _compiled(form), log_level=0, limits=_limits())
        if error := self._matcher.get_error():
            raise RequestError(f"the {form.kind} cannot be used: {error.splitlines()[0][:300]}")
        self._vocab_size = vocabulary.vocab_size
        self._eos = tokenizer.eos_token_id
        self._starts_after = starts_after
        self._is_active = starts_after is None
        self._bits = torch.zeros((self._vocab_size + 31) // 32, dtype=torch.int32)

    def mask(self) -> Tensor:
        """Bool `[V]`: tokens that may come next."""
        if not self._is_active:
            free_V = torch.ones(self._vocab_size, dtype=torch.bool)
            free_V[self._eos] = False
            return free_V
        if self._matcher.is_stopped():
            only_V = torch.zeros(self._vocab_size, dtype=torch.bool)
            only_V[self._eos] = True
            return only_V
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.numel() * 4)
        if error := self._matcher.get_error():
            raise RequestError(f"the form became too expensive: {error.splitlines()[0][:300]}")
        shifts = torch.arange(32, dtype=torch.int32)
        return ((self._bits.unsqueeze(1) >> shifts) & 1).bool().view(-1)[: self._vocab_size]

    def advance(self, token_id: int) -> None:
        """Take note of a drawn token."""
        if not self._is_active:
            self._is_active = token_id == self._starts_after
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)


def check_available() -> None:
    """Refuse forms where llguidance is not installed.

    Raises:
        RequestError: says what to install.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise RequestError("structured answers need llguidance on the server: pip install llguidance.") from None


def _compiled(form: Form) -> str:
    """llguidance's own description of a form.

    Raises:
        RequestError: not a schema, expression or grammar, or too expensive.
    """
    from llguidance import LLMatcher

    try:
        if form.kind == "json_object":
            return str(LLMatcher.grammar_from_json_schema(json.dumps({"type": "object"})))
        if form.kind == "json_schema":
            return str(LLMatcher.grammar_from_json_schema(form.text))
        if form.kind == "regex":
            return str(LLMatcher.grammar_from_regex(form.text))
        return str(LLMatcher.grammar_from_lark(form.text))
    except ValueError as error:
        raise RequestError(f"the {form.kind} cannot be used: {str(error).splitlines()[0][:300]}") from None


def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


class _Vocabulary:
    """A tokenizer as llguidance reads it: the bytes of every token, special ones marked so that no text matches them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = sorted(tokenizer.special_tokens.values())
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.special_token_ids = special
        marked = set(special)
        self.tokens = [
            f"<[{token}]>".encode() if token in marked else tokenizer.token_bytes(token)
            for token in range(tokenizer.vocab_size)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))


_prepared: dict[str, Any] = {}
"""llguidance's view of a tokenizer takes a second to make for a large vocabulary: kept by the tokenizer's digest."""


def _vocabulary(tokenizer: Tokenizer) -> Any:
    import llguidance

    if tokenizer.digest not in _prepared:
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        _prepared[tokenizer.digest] = llguidance.LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size)
    return _prepared[tokenizer.digest]
