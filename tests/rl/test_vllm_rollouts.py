"""Rollouts over HTTP in vLLM's protocol. The server here answers with our own engine over the exported checkpoint; the run
against vLLM itself is in docs/log.md."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from shoal.checkpoint.hf_format import load_model
from shoal.engine.engine import Engine
from shoal.engine.request import Request, SamplingParams
from shoal.errors import ConfigError, RolloutError
from shoal.model.transformer import Transformer, initialise
from shoal.rl.vllm_rollouts import VllmEngine
from tests.model.test_mla import TINY

REQUESTS = [
    Request(prompt_ids=(3, 4, 5 + k), sampling=SamplingParams(max_tokens=6, num_samples=2, seed=k)) for k in range(3)
]


class Server:
    """The four routes, and what was asked of them."""

    def __init__(self, directory):
        self.directory, self.asked, self.engine, self.root, self.drop = directory, [], None, str(directory), False
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                self.reply({"data": [{"id": "policy", "root": outer.root}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body))
                if self.path == "/collective_rpc":
                    config, state = load_model(outer.directory)
                    model = Transformer(config)
                    model.load_state_dict(state)
                    outer.engine = Engine(model.eval())
                self.reply(outer.complete(body) if self.path == "/v1/completions" else {})

            def reply(self, value):
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def complete(self, body):
        sampling = SamplingParams(max_tokens=body["max_tokens"], num_samples=body["n"], seed=body["seed"])
        with self.lock:
            (found,) = self.engine.generate([Request(prompt_ids=tuple(body["prompt"]), sampling=sampling)])
        choices = [
            {
                "index": index,
                "token_ids": None if self.drop else completion.token_ids,
                "logprobs": {"token_logprobs": completion.logprobs},
                "finish_reason": completion.finish_reason,
            }
            for index, completion in enumerate(found)
        ]
        return {"choices": choices[::-1]}


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "policy")
    yield server
    server.http.shutdown()


def tiny_model():
    model = Transformer(TINY.replace(vocab_size=300))
    initialise(model, 0)
    return model.eval()


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert [c.token_ids for c in mine] == [c.token_ids for c in theirs]
        assert [c.finish_reason for c in mine] == [c.finish_reason for c in theirs]
        assert all(a.logprobs == pytest.approx(b.logprobs, abs=1e-4) for a, b in zip(mine, theirs))


def test_the_server_samples_from_the_newest_weights(server, tmp_path):
    model = tiny_model()
    engine = VllmEngine(model, url=server.url, directory=server.directory)
    assert_same(engine.generate(REQUESTS), Engine(model).generate(REQUESTS))
    engine.generate(REQUESTS[:1])
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1.5)
    assert_same(engine.generate(REQUESTS), Engine(model).generate(REQUESTS))
    reloads = [body for path, body in server.asked if path == "/collective_rpc"]
    assert reloads == [{"method": "reload_weights"}] * 2, "once per change of the weights"
    assert [path for path, _ in server.asked].count("/reset_prefix_cache") == 2


def test_what_is_wrong_is_said_with_the_command_that_puts_it_right(server):
    model = tiny_model()
    with pytest.raises(ConfigError, match="address of a server"):
        VllmEngine(model, url="localhost", directory=server.directory)
    server.root = "/somewhere/else"
    with pytest.raises(RolloutError, match="serves /somewhere/else; start one for this run: VLLM_SERVER_DEV_MODE=1"):
        VllmEngine(model, url=server.url, directory=server.directory).generate(REQUESTS)
    server.root, server.drop = str(server.directory), True
    with pytest.raises(RolloutError, match="lacks token ids"):
        VllmEngine(model, url=server.url, directory=server.directory).generate(REQUESTS)
