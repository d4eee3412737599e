"""DeepSeek's tool calls out of a model's text, as they come.

Both published forms are read, told apart by what stands before the separator:

    V3, R1   CALL_BEGIN function SEPARATOR name newline ```json newline {...} newline ``` CALL_END
    V3.1     CALL_BEGIN name SEPARATOR {...} CALL_END

Where the tokenizer has the marks as tokens only those count, so that a model which quotes a mark calls nothing; elsewhere
the marks are found in the text. What begins like a call and is none, because it was cut off or badly made, is content.
"""

import re

from shoal.server.pieces import Piece
from shoal.text.tokenizer import Tokenizer
from shoal.text.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, MARKS, SEPARATOR

_MARK = re.compile("|".join(re.escape(mark) for mark in MARKS))
_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n")
_CLOSING = re.compile(r"\s*(?:```)?\s*$")
_MAYBE_CLOSING = re.compile(r"\s*`{0,3}\s*$")


def mark_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """The marks that are tokens, by id."""
    found = {tokenizer.token_id(mark): mark for mark in MARKS}
    return {token_id: mark for token_id, mark in found.items() if token_id is not None}


class CallReader:
    """Takes text and marks, gives out content, calls and arguments.

    Args:
        in_text: marks are spelled in the text, for a tokenizer without tokens for them.
    """

    def __init__(self, *, in_text: bool) -> None:
        self.in_text = in_text
        self.is_open = False
        """Inside the block of calls."""
        self._state = "outside"
        self._unread = ""
        """Text that may hold the beginning of a mark."""
        self._raw = ""
        """What was read of a call that may yet turn out to be none."""
        self._fence: bool | None = None
        self._held = ""

    def text(self, text: str) -> list[Piece]:
        """Pieces of ordinary text."""
        if not self.in_text:
            return self._text(text)
        pieces: list[Piece] = []
        self._unread += text
        while found := _MARK.search(self._unread):
            before, self._unread = self._unread[: found.start()], self._unread[found.end() :]
            pieces += self._text(before) + self.mark(found.group())
        keep = max(overlap(self._unread, mark) for mark in MARKS)
        before, self._unread = self._unread[: len(self._unread) - keep], self._unread[len(self._unread) - keep :]
        return pieces + self._text(before)

    def mark(self, mark: str) -> list[Piece]:
        """Pieces that a mark makes final."""
        self._raw += mark
        if mark == CALLS_BEGIN:
            self._state, self._raw = "between", mark
        elif mark == CALL_BEGIN:
            self._state, self._held = "header", ""
        elif mark == SEPARATOR and self._state == "header":
            return self._separate()
        elif mark == CALL_END:
            return self._end_call()
        elif mark == CALLS_END:
            self._state, self._raw = "outside", ""
        self.is_open = self._state != "outside"
        return []

    def finish(self) -> list[Piece]:
        """What was still held back when the text ended."""
        pieces = self._text(self._unread)
        self._unread = ""
        if self._state in ("header", "name"):
            pieces.append(Piece("content", self._raw))
        elif self._state == "arguments":
            pieces += self._arguments_up_to_closing()
        self._state, self._raw, self.is_open = "outside", "", False
        return pieces

    def _text(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._state == "outside":
            return [Piece("content", text)]
        self._raw += text
        if self._state == "between":
            return [Piece("content", text)] if text.strip() else []
        self._held += text
        if self._state == "name":
            return self._name()
        return self._arguments() if self._state == "arguments" else []

    def _separate(self) -> list[Piece]:
        header, self._held = self._held.strip(), ""
        self.is_open = True
        if header == "function":
            self._state = "name"
            return []
        return self._begin(header, fenced=False)

    def _name(self) -> list[Piece]:
        name, newline, rest = self._held.partition("\n")
        if not newline:
            return []
        self._held = newline + rest
        return self._begin(name.strip(), fenced=None) + self._arguments()

    def _begin(self, name: str, fenced: bool | None) -> list[Piece]:
        self._state, self._fence, self._raw = "arguments", fenced, ""
        return [Piece("call", name)]

    def _arguments(self) -> list[Piece]:
        """The arguments so far, all but what may be the fence around them."""
        if self._fence is None:
            found = _FENCE.match(self._held)
            if found:
                self._fence, self._held = True, self._held[found.end() :]
            elif self._held.strip() and not "```json\n".startswith(self._held.strip()):
                self._fence = False
            else:
                return []
        closing = _MAYBE_CLOSING.search(self._held)
        cut = closing.start() if closing else len(self._held)
        given, self._held = self._held[:cut], self._held[cut:]
        return [Piece("arguments", given)] if given else []

    def _arguments_up_to_closing(self) -> list[Piece]:
        given, self._held = _CLOSING.sub("", self._held), ""
        return [Piece("arguments", given)] if given else []

    def _end_call(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._state == "name":
            pieces = self._begin(self._held.strip(), fenced=False)
        elif self._state == "arguments":
            pieces = self._arguments_up_to_closing()
        elif self._state == "header":
            pieces = [Piece("content", self._raw)]
        self._state, self._held, self._raw, self.is_open = "between", "", "", True
        return pieces


def overlap(text: str, target: str) -> int:
    """Length of the longest end of `text` that begins `target`."""
    return next((size for size in range(min(len(text), len(target) - 1), 0, -1) if text.endswith(target[:size])), 0)
