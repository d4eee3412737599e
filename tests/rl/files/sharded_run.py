"""What `test_sharded_learner.py` runs under torchrun: a short stage; the leader writes the weights it ends with."""

import sys
from pathlib import Path

import safetensors.torch
import torch

from shoal.rl.grpo import train_grpo
from shoal.rl.ranks import torchrun_ranks
from shoal.rl.sharded_learner import follow, sharded_makers
from tests.rl.test_sharded_learner import PROBLEMS, PROMPTER, stage, tiny_model

torch.set_num_threads(1)
run_dir, steps = Path(sys.argv[1]), int(sys.argv[2])
with torchrun_ranks() as ranks:
    assert ranks is not None
    if ranks.rank:
        follow(ranks)
    else:
        learners, engines = sharded_makers(ranks)
        model = tiny_model()
        train_grpo(model, stage(steps), PROBLEMS, PROMPTER, run_dir, engines=engines, learners=learners)
        safetensors.torch.save_file(model.state_dict(), run_dir / "weights.safetensors")
