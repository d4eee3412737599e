"""Token ids to what a client reads: reasoning apart from content, tags left out, stop strings never leaked.

Reasoning is what stands between the think tokens, told by token id, not by text: a model that merely spells `<think>` in
its answer has not thought. The answer tags of R1-Zero's format are shown to nobody.
"""

from dataclasses import dataclass

from shoal.text.tokenizer import ANSWER, END_ANSWER, END_THINK, THINK, StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Piece:
    """A bit of text for the client."""

    kind: str
    """"reasoning" or "content"."""
    text: str


class AnswerReader:
    """Turns one sample's tokens into pieces as they come.

    Args:
        starts_thinking: the template itself opened the thinking.
        stop: strings that end the content; what could be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, starts_thinking: bool = False, stop: tuple[str, ...] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._think, self._end_think = tokenizer.token_id(THINK), tokenizer.token_id(END_THINK)
        self._hidden = {tokenizer.token_id(ANSWER), tokenizer.token_id(END_ANSWER), tokenizer.eos_token_id}
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.is_thinking = starts_thinking
        self.reasoning_tokens = 0
        self.content_ids: list[int] = []
        """Tokens that the content was written with."""
        self.stopped = False
        """A stop string was reached; nothing after it is given out."""

    def push(self, token_id: int) -> list[Piece]:
        """What can be shown now that this token is known."""
        if self.stopped:
            return []
        if token_id in (self._think, self._end_think):
            pieces = self._flush()
            self.is_thinking = token_id == self._think
            self.reasoning_tokens += 1
            return pieces
        self.reasoning_tokens += self.is_thinking
        if token_id in self._hidden:
            return []
        if not self.is_thinking:
            self.content_ids.append(token_id)
        return self._emit(self._decoder.push(token_id))

    def finish(self) -> list[Piece]:
        """What was still held back."""
        return [] if self.stopped else self._flush()

    def _emit(self, text: str) -> list[Piece]:
        if self.is_thinking or not self._stop:
            return self._piece(text)
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return self._piece(text)
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._piece(text)

    def _flush(self) -> list[Piece]:
        pieces = self._emit(self._decoder.finish())
        held, self._held = self._held, ""
        return pieces + ([] if self.stopped else self._piece(held))

    def _piece(self, text: str) -> list[Piece]:
        return [Piece("reasoning" if self.is_thinking else "content", text)] if text else []


class PlainReader(AnswerReader):
    """Text as the model wrote it: no thinking, tags spelled out, special tokens other than those left out."""

    def __init__(self, tokenizer: Tokenizer, *, stop: tuple[str, ...] = ()) -> None:
        super().__init__(tokenizer, stop=stop)
        self._hidden = {tokenizer.eos_token_id}
        self._think = self._end_think = None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
