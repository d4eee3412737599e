"""The command line: a file per room, a verb per job. It parses, calls and prints; nothing is decided here.

Results for programs go to standard output as one JSON object (`--json`), everything for people to standard error.
Users' mistakes end with one message and exit code 2; a traceback is a bug of ours.
"""

import sys

from shoal.allocator import keep_memory
from shoal.cli import bench, convert, engine, machine, plan, r1, recipes, rl, server, training
from shoal.cli.root import app
from shoal.errors import ShoalError

__all__ = ["app", "main"]

VERB_FILES = (recipes, training, rl, r1, engine, server, convert, bench, plan, machine)
"""Importing a file adds its verbs."""


def main() -> None:
    """Entry point of the `shoal` command."""
    keep_memory()
    try:
        app()
    except ShoalError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from the last checkpoint.\n")
        raise SystemExit(130) from None
