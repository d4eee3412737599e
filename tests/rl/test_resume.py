"""A run that is killed with -9, wherever it is, goes on to the very weights it would have had."""

import multiprocessing
import os
import signal

import pytest
import torch

import shoal.rl.learner as learner
from shoal.checkpoint import atomic, store
from shoal.log import read_metrics
from shoal.rl.grpo import train_grpo
from shoal.rl.objective import ObjectiveConfig
from shoal.rl.rewards import WeightedReward
from tests.rl.test_update import PROBLEMS, PROMPTER, _config, _model


def _by_parity(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 2) for ids in completion_ids]


REWARDS = [WeightedReward(function=_by_parity)]
CLEAN = multiprocessing.get_context("forkserver")
"""Children of a process that has imported everything and computed nothing: OpenMP does not survive a fork."""
CLEAN.set_forkserver_preload(["tests.rl.test_resume"])

VARIETIES = {
    "on policy, reference, two minibatches": {
        "objective": ObjectiveConfig(kl_coefficient=0.01),
        "minibatches": 3,
        "reference_refresh_steps": 3,
    },
    "stale by two, dynamic sampling": {"staleness": 2, "dynamic_sampling": True, "max_sampling_rounds": 2},
    "everything replayed, stale by one": {
        "staleness": 1,
        "keep_routing": True,
        "keep_sampling_mask": True,
        "top_k": 20,
        "temperature": 0.8,
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are cut up by the number of threads: these runs take one, and other tests get theirs back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _train(run_dir, changes):
    model = _model()
    train_grpo(model, _config(steps=6, checkpoint_every=2, **changes), PROBLEMS, PROMPTER, run_dir, rewards=REWARDS)
    return model.state_dict()


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(function, call):
    """`function`, but the process is gone before its n-th call."""
    calls = []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            _die()
        return function(*arguments, **options)

    return wrapped


def _train_until_killed(where, run_dir, changes):
    if where == "rollout":
        PROMPTER.text = _dying(PROMPTER.text, 30)
    elif where == "update":
        learner.update_policy = _dying(learner.update_policy, 4)
    elif where == "writing a checkpoint":
        store.save_file = _dying(store.save_file, 2)
    else:
        atomic._put_in_place = _dying(atomic._put_in_place, 2)
    torch.set_num_threads(1)  # a process of its own
    _train(run_dir, changes)


@pytest.mark.parametrize("where", ["rollout", "update", "writing a checkpoint", "naming a checkpoint"])
def test_killed_anywhere_a_run_resumes_bit_for_bit(tmp_path, where):
    changes = VARIETIES["on policy, reference, two minibatches"]
    whole = _train(tmp_path / "whole", changes)
    process = CLEAN.Process(target=_train_until_killed, args=(where, tmp_path / "killed", changes))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = _train(tmp_path / "killed", changes)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert [line["step"] for line in second] == [1, 2, 3, 4, 5, 6]
    assert [line["entropy"] for line in first] == [line["entropy"] for line in second]


@pytest.mark.parametrize("name", list(VARIETIES)[1:])
def test_samples_under_way_survive_a_stop(tmp_path, name):
    class Stop(Exception):
        pass

    def stop(step):
        if step == 5:
            raise Stop

    changes = VARIETIES[name]
    whole = _train(tmp_path / "whole", changes)
    with pytest.raises(Stop):
        train_grpo(
            _model(),
            _config(steps=6, checkpoint_every=2, **changes),
            PROBLEMS,
            PROMPTER,
            tmp_path / "broken",
            rewards=REWARDS,
            after_step=stop,
        )
    resumed = _train(tmp_path / "broken", changes)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
