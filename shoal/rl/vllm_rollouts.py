"""Rollouts from a vLLM server, which reads the policy as an exported checkpoint and reads it again after every update.

    VLLM_SERVER_DEV_MODE=1 vllm serve RUN/rollout-model --port 8001 --logprobs-mode processed_logprobs
    shoal rl --task chain_sum --rollouts vllm:http://127.0.0.1:8001

Shoal writes the directory (published layout, whole or not at all), then asks the server to reload it and to forget its
prefixes; both are routes of vLLM's development mode, so the server belongs on an address that nobody else reaches. Log-
probabilities must be those of the distribution that was drawn from, hence the mode. vLLM computes with other kernels than
the trainer: samples differ from the engine's own, `mismatch_kl` in the metrics says by how much, and `v3.2` or importance
weights pay for it.
"""

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint.hf_format import SavesInto, save_model
from shoal.engine.request import Completion, Request
from shoal.errors import ConfigError, RolloutError
from shoal.log import say
from shoal.model.transformer import Transformer
from shoal.rl.rollout import RolloutEngine

START_TIMEOUT_S = 1800.0
"""vLLM compiles when it starts, and somebody has to start it."""
ANSWER_TIMEOUT_S = 3600.0


class VllmEngine:
    """`generate` like `engine.Engine`, by a vLLM server.

    Args:
        model: whose weights the server is given, as they are at each call.
        url: of the server, such as http://127.0.0.1:8001.
        directory: where it reads the model.
        beside: what else belongs there: the tokenizer, which vLLM wants.
        max_rows: samples asked for at once.
    Raises:
        ConfigError: `url` is none.
    """

    def __init__(
        self, model: Transformer, *, url: str, directory: Path, beside: Iterable[SavesInto] = (), max_rows: int = 1024
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--rollouts vllm:URL needs the address of a server, got {url!r}.")
        self.model, self.max_rows = model, max_rows
        self._url, self._directory, self._beside = url.rstrip("/"), directory, tuple(beside)
        self._digest, self._is_known = b"", False

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of every request, in order, one per sample.

        Raises:
            RolloutError: the server does not answer, answers with an error, or serves another model.
        """
        self._publish()
        with ThreadPoolExecutor(max(1, min(len(requests), 64))) as threads:
            return list(threads.map(self._complete, requests))

    def _publish(self) -> None:
        """Write the weights and have them read, unless the server has them."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self.model.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if digest.digest() == self._digest:
            return
        save_model(
            self._directory, self.model.config, self.model.state_dict(), dtype=torch.float32, beside=self._beside
        )
        if not self._is_known:
            self._meet()
        self._post("/collective_rpc", {"method": "reload_weights"})
        self._post("/reset_prefix_cache", {})
        self._digest = digest.digest()

    def _meet(self) -> None:
        """Wait for the server, and see that it reads what we write."""
        deadline_s, told = time.monotonic() + START_TIMEOUT_S, False
        while True:
            try:
                models = self._get("/v1/models")
                break
            except (OSError, RolloutError) as error:
                if time.monotonic() > deadline_s:
                    raise RolloutError(
                        f"no vLLM server answers at {self._url} ({error}); start it: {self._start}"
                    ) from error
                if not told:
                    say(f"waiting for vLLM at {self._url}; start it: {self._start}")
                    told = True
                time.sleep(1.0)
        self._name, root = str(models["data"][0]["id"]), str(models["data"][0].get("root"))
        if Path(root).resolve() != self._directory.resolve():
            raise RolloutError(f"the server at {self._url} serves {root}; start one for this run: {self._start}")
        self._is_known = True

    @property
    def _start(self) -> str:
        port = self._url.rpartition(":")[2]
        return f"VLLM_SERVER_DEV_MODE=1 vllm serve {self._directory} --port {port} --logprobs-mode processed_logprobs"

    def _complete(self, request: Request) -> list[Completion]:
        sampling = request.sampling
        body = {
            "model": self._name,
            "prompt": list(request.prompt_ids),
            "n": sampling.num_samples,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "seed": None if sampling.seed is None else sampling.seed % (1 << 62),
            "stop_token_ids": list(sampling.stop_token_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        choices = sorted(self._post("/v1/completions", body)["choices"], key=lambda choice: int(choice["index"]))
        if len(choices) != sampling.num_samples:
            raise RolloutError(f"vLLM gave {len(choices)} samples for n={sampling.num_samples}.")
        return [_completion(choice) for choice in choices]

    def _get(self, path: str) -> Any:
        return self._answer(urllib.request.Request(self._url + path), 10.0)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        return self._answer(request, ANSWER_TIMEOUT_S)

    def _answer(self, request: urllib.request.Request, timeout_s: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                content = response.read()
            return json.loads(content) if content else None
        except urllib.error.HTTPError as error:
            hint = ""
            if error.code == 404 and not request.selector.startswith("/v1/"):
                hint = f" It was not started in development mode: {self._start}"
            raise RolloutError(
                f"{request.full_url} answered {error.code}: {error.read(500).decode(errors='replace')}.{hint}"
            ) from error
        except (ValueError, OSError) as error:
            raise RolloutError(f"{request.full_url}: {error}") from error


def vllm_engines(url: str, directory: Path, beside: Iterable[SavesInto]) -> Callable[[Transformer, int], RolloutEngine]:
    """A maker of engines that ask one server."""

    def make(model: Transformer, max_rows: int) -> RolloutEngine:
        return VllmEngine(model, url=url, directory=directory, beside=beside, max_rows=max_rows)

    return make


def _completion(choice: dict[str, Any]) -> Completion:
    """Token ids and the log-probabilities they were drawn with; the last id is the one that ended the answer."""
    ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(ids, list) or not isinstance(logprobs, list) or len(ids) != len(logprobs):
        raise RolloutError("vLLM's answer lacks token ids or their log-probabilities; it needs vLLM 0.11 or newer.")
    return Completion(
        token_ids=[int(token) for token in ids],
        logprobs=[float(value) for value in logprobs],
        finish_reason="stop" if choice.get("finish_reason") == "stop" else "length",
    )
