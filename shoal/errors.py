"""The mistakes a user can make, each as an exception whose message says what is wrong and what to do.

Everything the command line shows as a one-line message with exit code 2 derives from `ShoalError`. Any other exception
that reaches the top is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class ShoalError(Exception):
    """A user's mistake or a refused input. The message names the value, what is allowed, and what to do."""


class ConfigError(ShoalError):
    """A configuration that cannot be: an unknown key or preset, sizes that do not fit together."""


class DataError(ShoalError):
    """A corpus, shard or dataset that is missing, damaged or empty."""


class CheckpointError(ShoalError):
    """A model directory or training checkpoint that is missing, damaged or belongs to another run."""


class TokenizerError(ShoalError):
    """A tokenizer file or chat template that is missing, damaged or unsafe."""


class RequestError(ShoalError):
    """A generation request that cannot be served: too long, out of range, empty."""


class TaskError(ShoalError):
    """A task, verifier or reward that breaks its contract."""


class RolloutError(ShoalError):
    """Rollout workers that keep dying."""


class ServerError(ShoalError):
    """The server cannot start or go on: port in use, unsafe address, model missing."""


class DiskFullError(ShoalError):
    """No room to write; nothing half-written was left behind."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'hidden_size'?` for a slip of the hand, else nothing: a part of a message about an unknown name."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""
