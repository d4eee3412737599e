"""What an answer is made of while it is being written: bits of reasoning, of content, of calls."""

from dataclasses import dataclass
from typing import Literal

PieceKind = Literal["reasoning", "content", "call", "arguments"]


@dataclass(frozen=True)
class Piece:
    """A bit of text for the client."""

    kind: PieceKind
    """"call" begins a call of the function that `text` names; "arguments" are a bit of its JSON."""
    text: str


@dataclass
class Call:
    """A function that the model asks for."""

    id: str
    name: str
    arguments: str = ""
