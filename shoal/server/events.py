"""Server-sent events, and errors in the shapes that clients read."""

import json
from typing import Any

DONE = b"data: [DONE]\n\n"

ANTHROPIC_KINDS = {
    "insufficient_balance": "billing_error",
    "server_error": "overloaded_error",
    "timeout_error": "timeout_error",
    "authentication_error": "authentication_error",
    "rate_limit_error": "rate_limit_error",
}


def event(payload: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    prefix = b"" if name is None else f"event: {name}\n".encode()
    return prefix + b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"


def error_body(message: str, kind: str, param: str | None = None, *, path: str = "") -> dict[str, Any]:
    """An error as OpenAI's and DeepSeek's clients read it, and under `/v1/messages` as Anthropic's do."""
    if path.startswith(("/v1/messages", "/anthropic")):
        return {
            "type": "error",
            "error": {"type": ANTHROPIC_KINDS.get(kind, "invalid_request_error"), "message": message},
        }
    return {"error": {"message": message, "type": kind, "param": param, "code": kind}}
