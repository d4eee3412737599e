"""What every system is asked, and the line it answers with. No imports: each peer runs in an environment of its own."""

import json
import random
import time

DECODE = ((1, 128), (8, 128), (1, 2048))
"""Sequences at once, and the tokens that each has in its cache."""
PREFILL = (512, 2048)
"""Lengths of one prompt."""
STEPS = 24
VOCABULARY = 32000


def tokens(count):
    return [random.randint(2, VOCABULARY) for _ in range(count)]


def report(kind, value, **point):
    print(json.dumps({"kind": kind, "tokens_per_s": value, **point}), flush=True)


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
