"""What went wrong, as a status code and a kind that clients know.

The codes are DeepSeek's: 400 a request that cannot be served, 401 no key, 402 no money, 413 too large, 422 a field out of
range, 429 too often, 503 not now. A 500 is a bug of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from shoal.errors import DiskFullError, ServerError, ShoalError
from shoal.planner.prices import PriceError
from shoal.server.keys import KeyStoreError
from shoal.server.ledger import BalanceError, LedgerError

NOT_NOW = (ServerError, DiskFullError, KeyStoreError, LedgerError, PriceError)
"""The server's own trouble: too many wait, the engine hangs, the ledger cannot be written, a price is missing."""


@dataclass(frozen=True)
class Refusal:
    """An error as it is answered."""

    status: int
    kind: str
    message: str
    param: str | None = None
    """The field that is wrong."""


def refusal_of(error: Exception) -> Refusal:
    """The answer to an error."""
    if isinstance(error, ValidationError):
        return _of_fields(error.errors(include_url=False, include_input=False))
    if isinstance(error, RequestValidationError):
        return _of_fields(error.errors())
    if isinstance(error, BalanceError):
        return Refusal(402, "insufficient_balance", str(error))
    if isinstance(error, NOT_NOW):
        return Refusal(503, "server_error", str(error))
    if isinstance(error, ShoalError):
        return Refusal(400, "invalid_request_error", str(error))
    return Refusal(500, "server_error", "the server failed on this request.")


def _of_fields(found: Sequence[Any]) -> Refusal:
    """The one mistake that says most: where a field may be several things, each of them has something to say."""
    worst = next((each for each in found if each["type"] == "limit"), found[0])
    # Between the names of fields stand those of alternatives, which mean something to pydantic alone.
    names = [str(part) for part in worst["loc"] if not any(mark in str(part) for mark in "[(")]
    where = ".".join(names)[:200] or "body"
    return Refusal(422, "invalid_request_error", f"{where}: {worst['msg']}"[:1000], where)
