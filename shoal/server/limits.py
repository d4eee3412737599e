"""Every bound that a request meets, in one place: what `shoal serve --limit NAME=VALUE` changes.

Each is a lever on somebody else's memory or time if it is left open (CVE-2026-34756: an unbounded `n`). The values are
published in `/openapi.json` as they are in force, and listed in `docs/serving.md`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from shoal.errors import ServerError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Sizes, counts, depths and times. A request over a size or count gets 413 or 422, over a time 408 or 503."""

    max_body_bytes: int = 8 << 20
    """Bytes of a request's body."""
    max_json_depth: int = 64
    """Levels of nesting in a body."""
    max_json_digits: int = 40
    """Digits of an integer in a body."""
    max_messages: int = 2000
    """Messages, or input items, of a conversation."""
    max_prompts: int = 16
    """Prompts of one text completion."""
    max_tools: int = 128
    """Tools of a request, and calls of one message."""
    max_samples: int = 16
    """`n`: answers to one prompt."""
    max_stops: int = 16
    """Stop strings, and stop token ids."""
    max_stop_characters: int = 256
    """Characters of a stop string."""
    max_top_logprobs: int = 20
    """Likeliest tokens named beside each token."""
    max_logit_biases: int = 1024
    """Token ids with a bias."""
    max_user_id_bytes: int = 512
    """Bytes of `user_id`, DeepSeek's bound."""
    max_schema_characters: int = 65_536
    """Characters of a JSON schema, regular expression or grammar."""
    default_max_tokens: int = 4096
    """Tokens of an answer whose request names no bound."""
    max_stored_responses: int = 1000
    """Answers of `/v1/responses` that `previous_response_id` can still name."""
    max_queue_s: float = 600.0
    """Seconds until the first token; DeepSeek's bound. 503 afterwards."""
    max_request_s: float = 3600.0
    """Seconds until the last token."""
    max_read_s: float = 60.0
    """Seconds that a client may take between two parts of its body. 408 afterwards."""
    max_write_s: float = 60.0
    """Seconds that a client may leave a part of its answer unread before the connection is closed."""
    keep_alive_s: float = 10.0
    """Seconds of silence after which a waiting client is sent a comment or an empty line."""
    watchdog_s: float = 300.0
    """Seconds of one engine step after which `/health` fails and its requests end with 503."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < 1 << 40:
                raise ServerError(f"limit {field.name}={value} would let nothing through; use a number above 0.")


def limits_from(pairs: Iterable[str]) -> RequestLimits:
    """The limits with those that `NAME=VALUE` texts change.

    Raises:
        ServerError: no such limit, or a value that is no number above 0.
    """
    usual = RequestLimits()
    kinds = {field.name: type(getattr(usual, field.name)) for field in fields(RequestLimits)}
    changed: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in kinds:
            raise ServerError(f"no limit is called {name!r}{did_you_mean(name, kinds)}; they are: {', '.join(kinds)}.")
        try:
            changed[name] = kinds[name](text)
        except ValueError:
            raise ServerError(f"limit {name}={text!r} is no {kinds[name].__name__}; write {name}=NUMBER.") from None
    return RequestLimits(**changed)
