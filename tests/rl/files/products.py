"""Products of small numbers, and every way in which a verifier can fail."""

import ctypes
import os
import random
import time

rewards = {"shortness": 0.5, "broken": 1.0}
exploits = ["", "12 13"]


def problems(seed):
    rng = random.Random(seed)
    while True:
        first, second = rng.randint(2, 90), rng.randint(2, 90)
        yield {
            "prompt": f"What is {first} * {second}?",
            "answer": str(first * second),
            "first": first,
            "second": second,
        }


def verify(problem, answer):
    if answer == "hang":
        time.sleep(100)
    if answer == "exit":
        os._exit(3)
    if answer == "memory":
        return bytearray(20 << 30)
    if answer == "segment":
        ctypes.string_at(0)
    if answer == "raise":
        raise KeyError("oh")
    if answer == "bad":
        return "yes"
    if answer == "nan":
        return float("nan")
    if answer == "print":
        print('{"score": 1.0}', flush=True)
        return 0.25
    if answer == "quit":
        raise SystemExit
    if answer == "secret":
        return "SHOAL_TEST_SECRET" in os.environ
    return int(answer) == problem["first"] * problem["second"]


def brute_force(problem):
    return [str(sum([problem["first"]] * problem["second"]))]


async def shortness(prompts, completions, completion_ids, answer, **columns):
    assert len(answer) == len(prompts)
    return [-len(text) / 100 for text in completions]


def broken(prompts, completions, completion_ids, **columns):
    raise ZeroDivisionError("no")
