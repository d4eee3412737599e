"""The command line: a file per room, a verb per job. It parses, calls and prints; nothing is decided here.

Results for programs go to standard output as one JSON object (`--json`), everything for people to standard error.
Users' mistakes end with one message and exit code 2; a traceback is a bug of ours.
"""

import os
import sys

from shoal.cli import bench, convert, engine, machine, plan, r1, recipes, rl, server, training
from shoal.cli.root import app
from shoal.errors import ShoalError

__all__ = ["app", "main"]

VERB_FILES = (recipes, training, rl, r1, engine, server, convert, bench, plan, machine)
"""Importing a file adds its verbs."""


def main() -> None:
    """Entry point of the `shoal` command."""
    prepare_memory()
    try:
        app()
    except ShoalError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from the last checkpoint.\n")
        raise SystemExit(130) from None


def prepare_memory() -> None:
    """Let the C allocator keep freed memory: training frees and takes the same large arrays every step."""
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    import ctypes

    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 << 20)
