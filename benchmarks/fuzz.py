"""Throw everything at the server that its own OpenAPI document allows and forbids, and bytes that no document describes.

    pip install schemathesis && PYTHONPATH=. python benchmarks/fuzz.py [--examples 60] [--blobs 2000] [--seed 1]

A real `shoal serve` process with a ledger serves a tiny random model (the weights do not matter, the paths do: the paged
engine, forms, tools, all APIs; its vocabulary is larger than its tokenizer's, as published ones are). Three rounds, each of

1. schemathesis on the published document: valid and invalid bodies for every operation, from examples, boundaries and
   random generation; a 500, a status or content type that is not published, or an answer that breaks its schema fails;
2. malformed bytes by raw sockets: broken heads, false lengths, torn and mutated JSON, deep nesting, endless numbers, half
   characters; a 500, a silence of more than 20 s, or a server that does not answer `/health` fails.

The first two rounds warm every path up; the third, with other seeds, must not make the process grow: resident memory within
5 % and no request left open. Exits 1 on any failure.
"""

import argparse
import http.client
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.checkpoint.hf_format import save_model
from shoal.config import ModelConfig
from shoal.model.transformer import Transformer, initialise
from shoal.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from shoal.text.tools import MARKS

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
ROUNDS = 3
SILENCE_S = 20.0
GROWTH_FRACTION = 0.05
MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    max_position_embeddings=512,
    initializer_range=0.3,
)
GOOD = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "how many fish?"}], "max_tokens": 8},
    "/v1/completions": {"prompt": "how many fish?", "max_tokens": 8},
    "/v1/responses": {"input": "how many fish?", "max_output_tokens": 8},
    "/v1/messages": {"messages": [{"role": "user", "content": "how many fish?"}], "max_tokens": 8},
    "/tokenize": {"text": "how many fish?"},
}


@dataclass
class Server:
    """The process under test."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def ask(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SILENCE_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def rss_bytes(self) -> int:
        """Resident memory."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def num_threads(self) -> int:
        """Threads of the process."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def num_files(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def gauge(self, name: str) -> float:
        """A number of `/metrics`."""
        found = re.search(rf"^vllm:{name}{{[^}}]*}} (\S+)$", self.ask("/metrics")[1].decode(), flags=re.MULTILINE)
        return float(found.group(1)) if found else float("nan")

    def settle(self) -> None:
        """Wait until nothing runs."""
        for _ in range(200):
            if self.gauge("num_requests_open") == 0:
                return
            time.sleep(0.1)


@dataclass
class Round:
    """What one round found."""

    seed: int
    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    schemathesis: dict[str, Any] = field(default_factory=dict)
    num_blobs: int = 0
    slowest_s: float = 0.0


def main() -> None:
    """Run, print, write, and say by the exit code whether it held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=60, help="random cases per operation and round")
    parser.add_argument("--blobs", type=int, default=2000, help="malformed requests per round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        rounds, sizes = [], []
        for number in range(ROUNDS):
            rounds.append(one_round(server, Path(folder), options, options.seed + number))
            server.settle()
            sizes.append(sizes_of(server))
        log = server.log.read_text(errors="replace")
    failures = [text for each in rounds for text in each.failures] + growth(sizes) + complaints(log)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": git("rev-parse", "--short", "HEAD"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "checks": CHECKS.split(","),
        "rounds": [
            {**vars(each), "statuses": dict(sorted(each.statuses.items())), "slowest_s": round(each.slowest_s, 3)}
            for each in rounds
        ],
        "after_round": sizes,
        "seconds": round(time.monotonic() - started_s, 1),
        "failures": failures,
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if failures else 0)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of its own process for a tiny model."""
    special = (*SPECIAL_TOKENS, *MARKS, "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    tokenizer = Tokenizer.train(["how many fish are in the shoal? 12 fish."] * 4, 300, special)
    model = Transformer(MODEL)
    initialise(model, 0)
    save_model(folder / "tiny", MODEL, model.state_dict())
    tokenizer.save(folder / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "shoal", "serve", str(folder / "tiny"), "--port", str(port), "--weights", "f32"]
    command += ["--ledger", str(folder / "ledger.sqlite"), "--cache-dir", str(folder / "cache"), "--cache-gib", "0.05"]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--limit", "max_read_s=1"], stdout=out, stderr=out)
    server = Server(process, port, log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_ready(server: Server) -> None:
    """Until `/ready` says so."""
    for _ in range(600):
        try:
            if server.ask("/ready")[0] == 200:
                return
        except OSError:
            pass
        if server.process.poll() is not None:
            raise SystemExit(f"the server did not start:\n{server.log.read_text()}")
        time.sleep(0.1)
    raise SystemExit("the server was not ready within a minute.")


def one_round(server: Server, folder: Path, options: argparse.Namespace, seed: int) -> Round:
    """Schemathesis, then malformed bytes."""
    found = Round(seed)
    run_schemathesis(server, folder, options.examples, found)
    rng = random.Random(seed)
    requests = [malformed(rng) for _ in range(options.blobs)]
    with ThreadPoolExecutor(16) as pool:
        for request, (status, seconds) in zip(requests, pool.map(lambda request: throw(server, request), requests)):
            note(server, request, status, seconds, found)
    return found


def run_schemathesis(server: Server, folder: Path, examples: int, found: Round) -> None:
    """All operations of the published document."""
    report = folder / f"report-{found.seed}.ndjson"
    command = ["schemathesis", "run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks", CHECKS]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(examples), "--seed", str(found.seed)]
    command += ["--request-timeout", str(SILENCE_S), "--generation-database", "none", "--no-color", "--no-shrink"]
    command += ["--continue-on-failure", "--warnings", "off", "--report", "ndjson", "--report-ndjson-path", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    counts = re.findall(r"(\d+) (generated|passed|found|skipped|unique failures)", done.stdout)
    found.schemathesis = {"exit_code": done.returncode, **{name: int(count) for count, name in counts}}
    if done.returncode:
        failed = done.stdout[done.stdout.find("= FAILURES") :] if "= FAILURES" in done.stdout else done.stdout[-3000:]
        found.failures.append(f"schemathesis, seed {found.seed}:\n{failed[:8000]}{done.stderr[-2000:]}")


def malformed(rng: random.Random) -> bytes:
    """A request that is wrong in one of many ways."""
    path = rng.choice([*GOOD, "/v1/chat/completions"])
    body = json.dumps(GOOD[path]).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    how = rng.randrange(12)
    if how < 4:
        body = mutated(rng, body)
    elif how == 4:
        body = b"[" * rng.randrange(1, 20000) if rng.random() < 0.5 else b'{"messages":' * rng.randrange(1, 3000)
    elif how == 5:
        body = body[:-1] + b', "seed": ' + b"9" * rng.randrange(1, 5000) + b"}"
    elif how == 6:
        body = json.dumps({**GOOD[path], "stop": "\ud800"}).encode()
    elif how == 7:
        odd: list[Any] = [None, -1, 10**30, 1e308, [], {}, "x" * 3000, True, [[]], {"a": {}}]
        name = rng.choice(
            [*GOOD[path], "n", "stop", "tools", "seed", "top_k", "stream", "logit_bias", "response_format"]
        )
        body = json.dumps({**GOOD[path], name: rng.choice(odd)}).encode()
    elif how == 8:
        return head + f"Content-Length: {rng.choice([-1, 10**30, 5, 'x'])}\r\n\r\n".encode() + body
    elif how == 9:
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(body), body) for _ in range(rng.randrange(3)))
        return (
            head
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + chunks
            + rng.choice([b"0\r\n\r\n", b"zz\r\n", b"5\r\nab\r\n0\r\n\r\n"])
        )
    elif how == 10:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 400))) + b"\r\n\r\n"
    elif how == 11:
        return (
            head
            + b"X-Long: "
            + b"a" * rng.randrange(1, 90000)
            + b"\r\n"
            + b"Content-Length: %d\r\n\r\n" % len(body)
            + body
        )
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def mutated(rng: random.Random, body: bytes) -> bytes:
    """Some bytes changed, lost or doubled."""
    data = bytearray(body)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(data))
        how = rng.randrange(3)
        if how == 0:
            data[place] = rng.randrange(256)
        elif how == 1:
            del data[place : place + rng.randrange(1, 6)]
        else:
            data[place:place] = data[place : place + rng.randrange(1, 20)]
        data = data or bytearray(b" ")
    return bytes(data)


def throw(server: Server, request: bytes) -> tuple[str, float]:
    """Send a request as it is; the status that comes back, and after how many seconds."""
    started_s = time.monotonic()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=SILENCE_S) as connection:
            connection.sendall(request)
            if b"\r\n\r\n" not in request or not request.startswith(b"POST"):
                connection.shutdown(socket.SHUT_WR)  # no whole head will come
            answer = connection.recv(200)
        status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"
    except (ConnectionError, BrokenPipeError):
        status = "closed"
    except TimeoutError:
        status = "silence"
    return status, time.monotonic() - started_s


def note(server: Server, request: bytes, status: str, seconds: float, found: Round) -> None:
    """Judge what came back."""
    found.num_blobs += 1
    found.slowest_s = max(found.slowest_s, seconds)
    found.statuses[status] += 1
    if status in ("500", "silence"):
        found.failures.append(f"{status} for {request[:400]!r}")
    if found.num_blobs % 100 == 0 and server.ask("/health")[0] != 200:
        found.failures.append(f"/health failed after {found.num_blobs} malformed requests")


def sizes_of(server: Server) -> dict[str, float]:
    """What must not grow."""
    return {
        "rss_bytes": server.rss_bytes(),
        "open_files": server.num_files(),
        "threads": server.num_threads(),
        "num_requests_open": server.gauge("num_requests_open"),
        "num_requests_running": server.gauge("num_requests_running"),
        "engine_restarts": server.gauge("engine_restarts_total"),
        "engine_failed_steps": server.gauge("engine_failed_steps_total"),
    }


def growth(sizes: list[dict[str, float]]) -> list[str]:
    """What the last round left bigger than the one before, or broken."""
    first, second = sizes[-2:]
    found = [f"{name}={second[name]}" for name in second if name.startswith(("num_", "engine_")) and second[name]]
    if second["rss_bytes"] > first["rss_bytes"] * (1 + GROWTH_FRACTION):
        found.append(f"resident memory grew from {first['rss_bytes']} to {second['rss_bytes']} bytes")
    if second["open_files"] > first["open_files"] + 2:
        found.append(f"open files grew from {first['open_files']} to {second['open_files']}")
    return found


def complaints(log: str) -> list[str]:
    """Lines of the server that tell of a failure of ours."""
    signs = ("Traceback", "a request failed", "an answer failed", "engine step failed", "thread died", "did not take")
    return [f"log: {line[:500]}" for line in log.splitlines() if any(sign in line for sign in signs)][:20]


def git(*arguments: str) -> str:
    """What git says."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
