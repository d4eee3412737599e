"""A real `shoal serve` process, killed and stopped: money, tokens and answers survive what they can."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from decimal import Decimal

import httpx
import pytest

from shoal.checkpoint.hf_format import save_model
from shoal.server.keys import KeyStore
from shoal.server.ledger import Ledger
from tests.server.conftest import tiny_model, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "how many fish?"}]


@pytest.fixture
def home(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, 2048)
    save_model(tmp_path / "tiny", model.config, model.state_dict())
    tokenizer.save(tmp_path / "tiny")
    return tmp_path


def start(home):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "shoal", "serve", str(home / "tiny"), "--port", str(port), "--cache-gib", "0.05"]
    command += ["--ledger", str(home / "ledger.sqlite"), "--cache-dir", str(home / "cache"), "--drain-s", "20"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return process, url
        except httpx.TransportError:
            pass
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    pytest.fail("the server was not ready in time")


def events(response):
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def body(**fields):
    return {"messages": MESSAGES, "stream": True, "logit_bias": {"1": -100}, **fields}


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_killed_server_loses_no_finished_answer_and_a_stopped_one_ends_those_that_run(home):
    secret = KeyStore(home / "ledger.sqlite").add("alice", Decimal(5))
    headers = {"Authorization": f"Bearer {secret}"}
    first, url = start(home)
    with (
        httpx.Client(base_url=url, headers=headers, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=body(max_tokens=1500, n=8)) as endless,
    ):
        endlessly = events(endless)  # kept: a generator that is dropped closes its response
        running = next(endlessly)["id"]
        with client.stream("POST", "/v1/chat/completions", json=body(max_tokens=20)) as short:
            last = next(event for event in events(short) if event.get("usage"))
            first.send_signal(signal.SIGKILL)  # the client has its answer, and the server no time for anything
            first.wait()
    ledger = Ledger(home / "ledger.sqlite")
    entry, usage = ledger.entry(last["id"]), last["usage"]
    assert entry.state == "settled" and format(entry.cost_usd, "f") == usage["cost_usd"]
    assert entry.output_tokens == usage["completion_tokens"] == 20
    assert entry.hit_tokens + entry.miss_tokens == usage["prompt_tokens"]
    assert ledger.entry(running).state == "running"
    ledger.close()

    second, url = start(home)
    ledger = Ledger(home / "ledger.sqlite")
    cut = ledger.entry(running)
    assert cut.state == "recovered" and cut.output_tokens >= 1 and cut.cost_usd > 0
    assert ledger.balance(entry.key_id) == 5 - entry.cost_usd - cut.cost_usd
    with (
        httpx.Client(base_url=url, headers=headers, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=body(max_tokens=300)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        second.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert second.wait(timeout=30) == 0
    assert re.search("1 requests that a crash had cut off", second.stderr.read())
    assert ledger.totals().num_running == 0
    ledger.close()
