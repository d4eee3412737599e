"""An answer as a row of blocks: thinking, text, calls. The form that OpenAI's Responses and Anthropic's Messages share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.server.generation import Sample
from shoal.server.pieces import Call, Piece

BlockKind = Literal["reasoning", "content", "call"]


@dataclass
class Block:
    """One of an answer's parts."""

    index: int
    kind: BlockKind
    text: str = ""
    """Reasoning, content, or the arguments of a call."""
    call: Call | None = None


@dataclass(frozen=True)
class Change:
    """A block begins, grows by `text`, or ends."""

    what: Literal["begin", "grow", "end"]
    block: Block
    text: str = ""


class BlockReader:
    """Puts the pieces of one sample into blocks."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.blocks: list[Block] = []
        self._open: Block | None = None
        self._calls = 0

    def read(self, pieces: Sequence[Piece]) -> list[Change]:
        """What the pieces change."""
        changes: list[Change] = []
        for piece in pieces:
            if piece.kind == "call":
                changes += self.end()
                changes.append(self._begin("call", self.sample.calls[self._calls]))
                self._calls += 1
                continue
            kind: BlockKind = "call" if piece.kind == "arguments" else piece.kind
            if self._open is None or self._open.kind != kind:
                changes += [*self.end(), self._begin(kind)]
            assert self._open is not None
            self._open.text += piece.text
            changes.append(Change("grow", self._open, piece.text))
        return changes

    def end(self) -> list[Change]:
        """End the open block, if there is one."""
        ended, self._open = self._open, None
        return [Change("end", ended)] if ended else []

    def _begin(self, kind: BlockKind, call: Call | None = None) -> Change:
        self._open = Block(len(self.blocks), kind, call=call)
        self.blocks.append(self._open)
        return Change("begin", self._open)
