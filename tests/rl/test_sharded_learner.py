"""Several processes under torchrun against one: the same samples, losses and weights."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import ConfigError
from shoal.log import read_metrics
from shoal.model.transformer import Transformer, initialise
from shoal.recipes.reinforce import reinforce_config, run_reinforce
from shoal.rl.grpo import train_grpo
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.objective import ObjectiveConfig
from shoal.rl.rollout import Prompter
from shoal.rl.sharded_learner import ShardedLearner
from shoal.rl.tasks import TASKS
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import Tokenizer
from shoal.training.optimizer import OptimizerConfig
from tests.model.test_mla import TINY

TOKENIZER = Tokenizer.train(["What is 3 + 4? The sum is 7."] * 3, 280)
PROMPTER = Prompter(TOKENIZER, ChatTemplate.default(TOKENIZER))
PROBLEMS = [TASKS["addition"].generate(random.Random(number), 1) for number in range(12)]
SCRIPT = Path(__file__).parent / "files" / "sharded_run.py"
SAME = ("reward", "loss", "grad_norm", "kl", "entropy", "mismatch", "clip_fraction", "response_tokens", "max_vio")


def tiny_model():
    config = TINY.replace(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=128, num_nextn_predict_layers=1)
    model = Transformer(config)
    initialise(model, 0)
    return model


def stage(steps, **changes):
    """A reference that is refreshed, several updates per rollout, moments: everything that ranks must agree about.

    AdamW's eps is large: with a small one, numbers whose gradient is nothing but rounding move by a whole rate.
    """
    values = {
        "steps": steps,
        "prompts_per_step": 4,
        "group_size": 4,
        "minibatches": 2,
        "max_response_tokens": 8,
        "micro_batch_answers": 3,
        "objective": ObjectiveConfig(kl_coefficient=0.05),
        "reference_refresh_steps": 2,
        "optimizer": OptimizerConfig(learning_rate=1e-3, eps=1e-3, weight_decay=0.01),
        "checkpoint_every": 2,
    }
    return GrpoConfig(**{**values, **changes})


def under_torchrun(processes, run_dir, steps):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(SCRIPT), str(run_dir), str(steps)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return safetensors.torch.load_file(run_dir / "weights.safetensors")


@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_learn_what_one_process_learns(processes, tmp_path):
    torch.manual_seed(0)
    alone = tiny_model()
    train_grpo(alone, stage(3), PROBLEMS, PROMPTER, tmp_path / "alone")
    together = under_torchrun(processes, tmp_path / "together", 3)
    start = tiny_model().state_dict()
    for name, tensor in alone.state_dict().items():
        assert torch.allclose(tensor, together[name], atol=2e-5), name
    assert any(not torch.equal(start[name], tensor) for name, tensor in together.items())
    for mine, theirs in zip(*(read_metrics(tmp_path / run / "metrics.jsonl") for run in ("alone", "together"))):
        for name in SAME:
            if name in mine:
                assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
    samples = [read_metrics(tmp_path / run / "samples.jsonl") for run in ("alone", "together")]
    assert [line["text"] for line in samples[0]] == [line["text"] for line in samples[1]]


def test_ranks_resume_where_they_stopped(tmp_path):
    whole = under_torchrun(2, tmp_path / "whole", 4)
    broken = tmp_path / "broken"
    under_torchrun(2, broken, 4)
    shutil.rmtree(broken / "checkpoints" / "rl" / "step-00000004")  # as if killed before it was written
    resumed = under_torchrun(2, broken, 4)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"staleness": 1}, "staleness=1"), ({"optimizer": OptimizerConfig(kind="muon")}, "needs whole matrices")],
)
def test_what_ranks_cannot_do_is_said_before_they_are_told(changes, says):
    with pytest.raises(ConfigError, match=says):
        ShardedLearner(None, tiny_model(), stage(2, **changes))


def test_what_torchrun_would_ignore_is_refused(tmp_path, monkeypatch):
    config = reinforce_config("addition", rollouts="ray")
    with pytest.raises(ConfigError, match="leave --rollouts ray out"):
        run_reinforce(tmp_path, config, object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (["rl"], ["rl", "--study", "dial"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2 and "torchrun needs --task" in done.output
