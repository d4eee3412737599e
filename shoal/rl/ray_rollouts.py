"""Rollouts on Ray: workers that sample with the same engine, on this machine or on a cluster.

A request carries its seed and a row's bits depend on nothing but its own text, so it does not matter which worker answers
it, in which company, or how often it had to be asked: the answers are those of one process, token by token. That makes a
dead worker harmless. Its requests go back into the queue and another worker takes its place.

Weights travel as safetensors bytes in Ray's object store, once per change. Requests and completions are our own dataclasses
between our own processes; nothing that came from a model or a file is unpickled.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch

from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.engine.request import Completion, Request
from shoal.errors import ConfigError, RolloutError
from shoal.log import say
from shoal.model.layers import product_dtype, set_compute_dtype
from shoal.model.transformer import Transformer
from shoal.rl.rollout import EngineMaker

PARTS_PER_WORKER = 2
"""Requests are dealt out in about so many parts per worker: the last ones to finish wait less for each other."""
MAX_DEATHS_PER_PART = 3
"""A part that killed so many workers is not tried again: the fault is in it, or in the machine."""


class RayEngine:
    """`generate` like `engine.Engine`, spread over worker processes.

    Args:
        model: whose weights the workers sample with, as they are at each call.
        num_workers: processes, one core each; on a cluster Ray places them.
        max_rows: samples running at once in each worker.
    Raises:
        ConfigError: Ray is not installed, or no worker is asked for.
    """

    def __init__(self, model: Transformer, *, num_workers: int, max_rows: int = 1024) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers={num_workers} must be at least 1.")
        self.model, self.max_rows, self.num_workers = model, max_rows, num_workers
        self.deaths = 0
        """Workers replaced so far."""
        self._ray = _ray()
        if not self._ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        self._digest, self._weights = b"", None
        self._workers = [self._start() for _ in range(num_workers)]

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of every request, in order, one per sample.

        Raises:
            RolloutError: requests that killed several workers in a row.
        """
        self._publish()
        size = max(1, -(-len(requests) // (self.num_workers * PARTS_PER_WORKER)))
        waiting = deque((start, 0) for start in range(0, len(requests), size))
        found: dict[int, list[list[Completion]]] = {}
        busy: dict[Any, tuple[int, int, int]] = {}
        idle = deque(range(self.num_workers))
        while waiting or busy:
            while waiting and idle:
                (start, deaths), slot = waiting.popleft(), idle.popleft()
                part = list(requests[start : start + size])
                answer = self._workers[slot].generate.remote(self._weights, self._digest, part)
                busy[answer] = (slot, start, deaths)
            for answer in self._ray.wait(list(busy), num_returns=1)[0]:
                slot, start, deaths = busy.pop(answer)
                try:
                    found[start] = self._ray.get(answer)
                except self._ray.exceptions.RayActorError as error:
                    waiting.appendleft((start, deaths + 1))
                    self._replace(slot, deaths + 1, error)
                idle.append(slot)
        return [completions for start in sorted(found) for completions in found[start]]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []

    def worker_pids(self) -> list[int]:
        """Process ids, for people who look and for tests that kill."""
        return [int(self._ray.get(worker.pid.remote())) for worker in self._workers]

    def _publish(self) -> None:
        """Put the weights into the object store, unless they are there."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        data = safetensors.torch.save(state)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest != self._digest:
            self._digest, self._weights = digest, self._ray.put(data)

    def _start(self) -> Any:
        dtype = product_dtype(self.model)
        actor = self._ray.remote(num_cpus=1, max_restarts=0)(RolloutWorker)
        return actor.remote(self.model.config.to_dict(), None if dtype is None else str(dtype), self.max_rows)

    def _replace(self, slot: int, deaths: int, error: Exception) -> None:
        if deaths >= MAX_DEATHS_PER_PART:
            raise RolloutError(
                f"the same rollout requests ended {deaths} workers one after another ({error}); look at the machine's memory, "
                "ask for fewer answers at once (prompts_per_step, group_size), or use --rollouts local."
            )
        self.deaths += 1
        say(f"a rollout worker died and is replaced ({self.deaths} so far); its requests are asked again")
        self._workers[slot] = self._start()


@contextmanager
def ray_engines(num_workers: int) -> Iterator[EngineMaker]:
    """Makes engines whose workers end with the block.

    Raises:
        ConfigError: Ray is not installed, or no worker is asked for.
    """
    made: list[RayEngine] = []

    def make(model: Transformer, max_rows: int) -> RayEngine:
        made.append(RayEngine(model, num_workers=num_workers, max_rows=max_rows))
        return made[-1]

    try:
        yield make
    finally:
        for engine in made:
            engine.close()


class RolloutWorker:
    """One process: a model of its own and the engine over it."""

    def __init__(self, config: dict[str, Any], compute_dtype: str | None, max_rows: int) -> None:
        torch.set_num_threads(1)
        self.model = Transformer(ModelConfig.from_dict(config)).eval()
        set_compute_dtype(self.model, torch.bfloat16 if compute_dtype == "torch.bfloat16" else None)
        self.engine = Engine(self.model, max_rows=max_rows)
        self.digest = b""

    def generate(self, weights: bytes, digest: bytes, requests: Sequence[Request]) -> list[list[Completion]]:
        """Take over the weights if they are new, then answer."""
        if digest != self.digest:
            self.model.load_state_dict(safetensors.torch.load(weights))
            self.digest = digest
        return self.engine.generate(requests)

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("rollouts on Ray need the extra 'cluster': pip install 'shoal[cluster]'.") from error
    return ray
