"""A real server under load: many clients, mixed lengths, some of whom leave without a word.

    python benchmarks/serve.py MODEL [--seconds 600] [--clients 64] [--leaving 0.1] [--output FILE]

Starts `shoal serve` as its own process and asks it what clients ask: chat and plain completions, streamed and whole, short
and long, with prompts that share a beginning and prompts that share nothing. What is checked while it runs:

- nothing lost: every request that was not cut off ends with 200, a finish reason, usage and a terminal event, and an
  answer cut by length has exactly the tokens it was allowed;
- nothing mixed up: a few greedy requests, answered once before the load, must give the same text in the middle of it;
- no status 500, no error event;
- afterwards no page is held, no request is open, and resident memory, file descriptors and threads are back to where they
  were after the first part of the load.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from http_client import Answer, complete, get

from shoal.device import describe_machine
from shoal.recipes.run import current_commit

WORDS = [
    "Mia",
    "has",
    "shells",
    "finds",
    "buys",
    "loses",
    "cards",
    "How",
    "many",
    "now",
    "Leo",
    "stamps",
    "eats",
    "drops",
    "apples",
    "gives",
]
SYSTEM_TEXT = "You count things with care. " * 6


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    canaries: int = 0
    tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)


class Load:
    """The clients of one run."""

    def __init__(self, base: str, args: argparse.Namespace, canaries: dict[str, str]) -> None:
        self.base, self.args, self.canaries = base, args, canaries
        self.tally = Tally()
        self.ends_s = time.monotonic() + args.seconds

    async def client(self, number: int) -> None:
        rng = random.Random(f"{self.args.seed}-{number}")
        await asyncio.sleep(rng.random())
        while time.monotonic() < self.ends_s:
            if rng.random() < 0.05:
                await self.ask_canary(rng)
                continue
            path, body = request_of(rng, self.args.max_context)
            leave_after = rng.choice((0, 1, 3, 10)) if body["stream"] and rng.random() < self.args.leaving else None
            await self.ask(path, body, leave_after)

    async def ask(self, path: str, body: dict[str, Any], leave_after: int | None) -> None:
        try:
            answer = await asyncio.wait_for(complete(self.base + path, body, leave_after=leave_after), 300)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, ValueError) as error:
            self.tally.lost.append(f"{type(error).__name__}: {error}")
            return
        self.tally.statuses[answer.status] += 1
        if leave_after is not None and not answer.is_done:
            self.tally.cut += 1
            return
        self.check(answer, body)

    def check(self, answer: Answer, body: dict[str, Any]) -> None:
        tally = self.tally
        whole = answer.status == 200 and answer.is_done and answer.error is None and answer.completion_tokens
        full = answer.finish_reason != "length" or answer.completion_tokens == body["max_tokens"]
        if not whole or answer.finish_reason not in ("stop", "length") or not full:
            tally.lost.append(f"{answer.status} {answer.finish_reason} {answer.completion_tokens} {answer.error}")
            return
        tally.finished[answer.finish_reason] += 1
        tally.tokens += answer.completion_tokens or 0
        if answer.first_token_s is not None:
            tally.first_token_s.append(answer.first_token_s)
            tally.between_s += [late - soon for soon, late in zip(answer.arrivals_s, answer.arrivals_s[1:])]

    async def ask_canary(self, rng: random.Random) -> None:
        prompt = rng.choice(list(self.canaries))
        answer = await complete(self.base + "/v1/completions", canary_body(prompt))
        self.tally.statuses[answer.status] += 1
        self.tally.canaries += 1
        if answer.text != self.canaries[prompt]:
            self.tally.wrong.append(f"{prompt[:40]!r}: {answer.text[:40]!r} is not {self.canaries[prompt][:40]!r}")


def request_of(rng: random.Random, max_context: int) -> tuple[str, dict[str, Any]]:
    """A request of some kind and length."""
    text = " ".join(rng.choice(WORDS) for _ in range(int(8 * (max_context / 64) ** rng.random())))
    body: dict[str, Any] = {
        "max_tokens": int(4 * 32 ** rng.random()),
        "temperature": rng.choice((0.0, 0.7, 1.0)),
        "stream": rng.random() < 0.8,
        "stream_options": {"include_usage": True},
    }
    if rng.random() < 0.25:
        return "/v1/completions", {**body, "prompt": text}
    system = [{"role": "system", "content": SYSTEM_TEXT}] if rng.random() < 0.5 else []
    return "/v1/chat/completions", {**body, "messages": [*system, {"role": "user", "content": text}]}


def canary_body(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 48, "temperature": 0.0, "stream": False}


class Server:
    """`shoal serve` in its own process."""

    def __init__(self, model: Path, port: int, folder: str, extra: list[str]) -> None:
        self.base = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "shoal", "serve", str(model), "--port", str(port), "--cache-dir", folder]
        self.command = ["shoal", *command[3:], *extra]
        self.process = subprocess.Popen([*command, *extra], stderr=sys.stderr)

    async def wait(self, timeout_s: float = 120) -> None:
        """Until it answers."""
        for _ in range(int(timeout_s * 5)):
            await asyncio.sleep(0.2)
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}")
            try:
                await get(self.base + "/health")
                return
            except (OSError, asyncio.IncompleteReadError):
                continue
        raise SystemExit("the server did not start")

    async def state(self) -> dict[str, float]:
        """Memory, descriptors and threads of the process, and what the server says it holds."""
        process = Path(f"/proc/{self.process.pid}")
        numbers = {
            "rss_mib": int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "fds": len(os.listdir(process / "fd")),  # noqa: PTH208
            "threads": len(os.listdir(process / "task")),  # noqa: PTH208
        }
        for line in (await get(self.base + "/metrics")).decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("vllm:") and "bucket" not in name:
                numbers[name.split("{")[0].removeprefix("vllm:") + _position(name)] = float(value)
        return numbers


def _position(name: str) -> str:
    return "_" + name.split('position="')[1].split('"')[0] if "position=" in name else ""


async def run(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The whole run; what is published."""
    server = Server(args.model, args.port, folder, args.serve)
    try:
        await server.wait()
        prompts = [f"{WORDS[k]} has {k + 11} shells, finds {k + 2}." + " How many shells now?" * k for k in range(8)]
        canaries = {
            prompt: (await complete(server.base + "/v1/completions", canary_body(prompt))).text for prompt in prompts
        }
        load = Load(server.base, args, canaries)
        states = [await server.state()]
        clients = asyncio.gather(*(load.client(number) for number in range(args.clients)))
        while not clients.done():
            await asyncio.wait([clients], timeout=args.seconds / 40)
            states.append(await server.state())
        await clients
        await asyncio.sleep(3)
        after = await server.state()
        exit_code = await stop(server.process)
    finally:
        server.process.kill()
    return {"serve_command": " ".join(server.command), **summary(args, load.tally, states, after, exit_code)}


async def stop(process: "subprocess.Popen[bytes]") -> int:
    """SIGTERM, as a supervisor does it; the exit code."""
    process.terminate()
    return await asyncio.to_thread(process.wait, 60)


def summary(
    args: argparse.Namespace, tally: Tally, states: list[dict[str, float]], after: dict[str, float], exit_code: int
) -> dict[str, Any]:
    warm = states[max(len(states) // 5, 1)]
    return {
        "seconds": args.seconds,
        "clients": args.clients,
        "requests": sum(tally.statuses.values()),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "finished": dict(tally.finished),
        "cut_by_client": tally.cut,
        "lost": len(tally.lost),
        "lost_examples": tally.lost[:5],
        "canaries": tally.canaries,
        "canaries_wrong": len(tally.wrong),
        "wrong_examples": tally.wrong[:5],
        "tokens_per_s": tally.tokens / args.seconds,
        "first_token_s": percentiles(tally.first_token_s),
        "between_tokens_s": percentiles(tally.between_s),
        "rss_mib": {
            "before": states[0]["rss_mib"],
            "after_a_fifth": warm["rss_mib"],
            "most": max(state["rss_mib"] for state in states),
            "after": after["rss_mib"],
        },
        "pages": {
            "in_use_most": max(state["kv_pages_in_use"] for state in states),
            "in_use_after": after["kv_pages_in_use"],
            "free_and_cached_after": after["kv_pages_free"] + after["kv_pages_cached"],
            "free_and_cached_before": states[0]["kv_pages_free"] + states[0]["kv_pages_cached"],
        },
        "fds": {"before": states[0]["fds"], "after": after["fds"]},
        "threads": {"before": states[0]["threads"], "after_a_fifth": warm["threads"], "after": after["threads"]},
        "open_requests_after": after["num_requests_open"],
        "exit_code_after_sigterm": exit_code,
        "server_numbers": {
            name: value for name, value in after.items() if name.endswith("_total") or "_per_pos" in name
        },
        "rss_mib_over_time": [round(state["rss_mib"], 1) for state in states],
    }


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(values), "count": len(values)}


def failures(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    bad = [f"{name} = {result[name]}" for name in ("lost", "canaries_wrong", "open_requests_after") if result[name]]
    bad += [f"status {status}: {count}" for status, count in result["statuses"].items() if status != "200"]
    if result["pages"]["in_use_after"]:
        bad.append(f"pages still in use: {result['pages']['in_use_after']}")
    if result["rss_mib"]["after"] > 1.1 * result["rss_mib"]["after_a_fifth"]:
        bad.append(f"memory grew: {result['rss_mib']}")
    if result["fds"]["after"] > result["fds"]["before"] + 4:
        bad.append(f"descriptors grew: {result['fds']}")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--leaving", type=float, default=0.1, help="share of streamed requests that are cut off")
    parser.add_argument("--max-context", type=int, default=512, help="of the model: prompts grow up to half of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--serve", nargs="*", default=[], help="further options of shoal serve, without dashes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.serve = [f"--{option}" for option in args.serve]
    with tempfile.TemporaryDirectory(prefix="shoal-serve-bench-") as folder:
        result = asyncio.run(run(args, folder))
    payload = {
        "command": "python " + " ".join(sys.argv),
        "commit": current_commit(),
        "machine": {**asdict(describe_machine()), "python": platform.python_version()},
        **result,
        "failures": failures(result),
    }
    if args.output:
        args.output.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in payload.items() if name != "rss_mib_over_time"}, indent=1))
    sys.exit(1 if payload["failures"] else 0)


if __name__ == "__main__":
    main()
