"""Rollouts on real Ray workers: the answers of one process, also when workers are killed."""

import os
import signal
import threading
import time

import pytest
import torch

from shoal.engine.engine import Engine
from shoal.engine.request import Request, SamplingParams
from shoal.errors import ConfigError, RolloutError
from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset

ray = pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
from shoal.rl.ray_rollouts import RayEngine  # noqa: E402

CONFIG = preset("demo").replace(hidden_size=64, num_hidden_layers=2, vocab_size=300, intermediate_size=64)


@pytest.fixture(scope="module")
def model():
    model = Transformer(CONFIG)
    initialise(model, 0)
    return model.eval()


@pytest.fixture(scope="module")
def workers(model):
    engine = RayEngine(model, num_workers=2)
    yield engine
    engine.close()
    ray.shutdown()


def requests(count, max_tokens=24):
    return [
        Request(
            prompt_ids=tuple(range(3, 8 + index % 5)),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=1.0, num_samples=3, seed=index),
        )
        for index in range(count)
    ]


@pytest.mark.slow
def test_workers_answer_as_one_process_does_and_follow_the_weights(model, workers):
    asked = requests(7)
    assert workers.generate(asked) == Engine(model).generate(asked)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1.5)
    changed = Engine(model).generate(asked)
    assert workers.generate(asked) == changed


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_step_loses_nothing(model, workers):
    asked = requests(24, max_tokens=300)
    expected = Engine(model).generate(asked)
    victim, before = workers.worker_pids()[0], workers.deaths

    def kill_soon():
        time.sleep(0.05)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill_soon)
    killer.start()
    answers = workers.generate(asked)
    killer.join()
    assert answers == expected
    workers.generate(requests(4))
    assert workers.deaths == before + 1
    assert victim not in workers.worker_pids()


@pytest.mark.slow
def test_requests_that_kill_every_worker_end_the_run_with_advice(workers, monkeypatch):
    monkeypatch.setattr("shoal.rl.ray_rollouts.MAX_DEATHS_PER_PART", 1)
    for worker in workers._workers:
        ray.kill(worker)
    with pytest.raises(RolloutError, match="fewer answers"):
        workers.generate(requests(2))


def test_no_worker_is_no_engine(model):
    with pytest.raises(ConfigError, match="at least 1"):
        RayEngine(model, num_workers=0)
