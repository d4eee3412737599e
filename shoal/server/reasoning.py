"""Token ids to what a client reads: reasoning apart from content, calls apart from both, stop strings never leaked.

Reasoning is what stands between the think tokens, told by token id, not by text: a model that merely spells `<think>` in
its answer has not thought. The answer tags of R1-Zero's format are shown to nobody.
"""

from shoal.server.pieces import Piece
from shoal.server.tool_calls import CallReader, mark_ids, overlap
from shoal.text.tokenizer import ANSWER, END_ANSWER, END_THINK, THINK, StreamDecoder, Tokenizer


class AnswerReader:
    """Turns one sample's tokens into pieces as they come.

    Args:
        starts_thinking: the template itself opened the thinking.
        stop: strings that end the content; what could be the beginning of one is held back.
        reads_calls: the model was told of tools.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        starts_thinking: bool = False,
        stop: tuple[str, ...] = (),
        reads_calls: bool = False,
    ) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._think, self._end_think = tokenizer.token_id(THINK), tokenizer.token_id(END_THINK)
        self._hidden = {tokenizer.token_id(ANSWER), tokenizer.token_id(END_ANSWER), tokenizer.eos_token_id}
        self._marks = mark_ids(tokenizer) if reads_calls else {}
        self._calls = CallReader(in_text=not self._marks) if reads_calls else None
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.is_thinking = starts_thinking
        self.reasoning_tokens = 0
        self.content_ids: list[int] = []
        """Tokens that the content was written with, up to its first call."""
        self.stopped_by: str | None = None
        """The stop string that was reached; nothing after it is given out."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was reached."""
        return self.stopped_by is not None

    def push(self, token_id: int) -> list[Piece]:
        """What can be shown now that this token is known."""
        if self.stopped:
            return []
        if token_id in (self._think, self._end_think):
            pieces = self._flush()
            self.is_thinking = token_id == self._think
            self.reasoning_tokens += 1
            return pieces
        if token_id in self._marks and self._calls is not None:
            pieces = self._flush()
            self.is_thinking = False  # some models call without ending their thinking first
            return pieces + self._calls.mark(self._marks[token_id])
        self.reasoning_tokens += self.is_thinking
        if token_id in self._hidden:
            return []
        if not self.is_thinking and not (self._calls and self._calls.is_open):
            self.content_ids.append(token_id)
        return self._emit(self._decoder.push(token_id))

    def finish(self) -> list[Piece]:
        """What was still held back."""
        if self.stopped:
            return []
        pieces = self._flush()
        if self._calls is None:
            return pieces
        return pieces + self._stopping(self._calls.finish()) + self._release()

    def _emit(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self.is_thinking:
            return [Piece("reasoning", text)]
        return self._stopping(self._calls.text(text) if self._calls else [Piece("content", text)])

    def _stopping(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces up to a stop string; an end that may be the beginning of one is held back."""
        if not self._stop:
            return pieces
        given: list[Piece] = []
        for piece in pieces:
            if piece.kind != "content":
                given += [*self._release(), piece]
                continue
            self._held += piece.text
            found = [(place, stop) for stop in self._stop if (place := self._held.find(stop)) >= 0]
            if found:
                place, self.stopped_by = min(found, key=lambda pair: pair[0])
                text, self._held = self._held[:place], ""
                return [*given, Piece("content", text)] if text else given
            keep = max(overlap(self._held, stop) for stop in self._stop)
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            given += [Piece("content", text)] if text else []
        return given

    def _flush(self) -> list[Piece]:
        pieces = self._emit(self._decoder.finish())
        return pieces if self.stopped else pieces + self._release()

    def _release(self) -> list[Piece]:
        """What was held back, now that it cannot become a stop string."""
        held, self._held = self._held, ""
        return [Piece("content", held)] if held and not self.stopped else []


class PlainReader(AnswerReader):
    """Text as the model wrote it: no thinking, tags spelled out, special tokens other than those left out."""

    def __init__(self, tokenizer: Tokenizer, *, stop: tuple[str, ...] = ()) -> None:
        super().__init__(tokenizer, stop=stop)
        self._hidden = {tokenizer.eos_token_id}
        self._think = self._end_think = None
