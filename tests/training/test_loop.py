import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from shoal.checkpoint.store import load_latest
from shoal.errors import CheckpointError, ConfigError
from shoal.model.transformer import Transformer, initialise
from shoal.text.loader import Loader
from shoal.text.packing import IGNORE_LABEL, Batch
from shoal.text.shards import Shards, ShardWriter
from shoal.training.loop import TrainingConfig, train
from shoal.training.loss import LossWeights
from shoal.training.optimizer import OptimizerConfig, OptimizerSet
from shoal.training.schedule import Schedule
from shoal.training.step import train_step
from tests.model.test_mla import TINY

CONFIG = TrainingConfig(
    steps=12,
    optimizer=OptimizerConfig(kind="muon", learning_rate=1e-2),
    schedule=Schedule(kind="cosine", warmup_steps=2, total_steps=12),
    precision="fp32",
    bias_freeze_fraction=0.25,
    log_every=1,
    checkpoint_every=3,
)


def make_shards(directory):
    generator = np.random.default_rng(0)
    writer = ShardWriter(directory, vocab_size=61, tokenizer_digest="abc")
    for _ in range(80):
        writer.add(generator.integers(0, 61, generator.integers(4, 14)))
    writer.close()


def run(directory, config=CONFIG, **changes):
    model = Transformer(TINY.replace(num_nextn_predict_layers=1, **changes))
    initialise(model, 0)
    loader = Loader(Shards.open(directory / "shards"), batch_rows=4, row_tokens=16, seed=1, mode="pack")
    result = train(model, config, loader, directory)
    return model, result


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def directory(tmp_path):
    make_shards(tmp_path / "shards")
    return tmp_path


def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(directory, tmp_path):
    whole, _ = run(directory)
    other = tmp_path / "other"
    make_shards(other / "shards")

    class Stop(Exception):
        pass

    def stop(step):
        if step == 8:
            raise Stop

    model = Transformer(TINY.replace(num_nextn_predict_layers=1))
    initialise(model, 0)
    loader = Loader(Shards.open(other / "shards"), batch_rows=4, row_tokens=16, seed=1, mode="pack")
    with pytest.raises(Stop):
        train(model, CONFIG, loader, other, after_step=stop)
    resumed, _ = run(other)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(directory, tmp_path):
    whole, _ = run(directory, replace(CONFIG, steps=40, checkpoint_every=2))
    other = tmp_path / "killed"
    make_shards(other / "shards")
    code = (
        "import sys; from pathlib import Path; from dataclasses import replace; from tests.training.test_loop import CONFIG, run; "
        "run(Path(sys.argv[1]), replace(CONFIG, steps=40, checkpoint_every=2))"
    )
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(other)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        before = time.monotonic()
        while not (other / "checkpoints").exists() and process.poll() is None and time.monotonic() - before < 60:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed, _ = run(other, replace(CONFIG, steps=40, checkpoint_every=2))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_resuming_with_another_configuration_is_refused(directory):
    run(directory)
    with pytest.raises(CheckpointError, match="weight_decay"):
        run(directory, replace(CONFIG, optimizer=replace(CONFIG.optimizer, weight_decay=0.5)))


def _batch(seed=0, masked=False):
    generator = np.random.default_rng(seed)
    token = generator.integers(0, 61, (3, 9))
    label = np.full_like(token, IGNORE_LABEL) if masked else generator.integers(0, 61, (3, 9))
    document = np.zeros_like(token)
    document[2, 5:] = -1
    return Batch(
        token_BS=token, label_BS=label, document_BS=document, position_BS=np.broadcast_to(np.arange(9), token.shape)
    )


def _step(model, batches, **options):
    optimizers = OptimizerSet(model, OptimizerConfig(learning_rate=1e-2))
    return train_step(model, optimizers, batches, **{"weights": LossWeights(), "bias_speed": 0.01, **options})


def test_a_batch_without_labels_changes_nothing_and_is_said_to_be_skipped():
    model = Transformer(TINY)
    initialise(model, 0)
    before = weights(model)
    result = _step(model, [_batch(masked=True)])
    assert result.grad_norm is None and result.num_labels == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_gradients_that_are_not_finite_move_no_weight():
    model = Transformer(TINY)
    initialise(model, 0)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    before = {name: tensor for name, tensor in weights(model).items() if "bias" not in name}
    assert _step(model, [_batch()]).grad_norm is None
    assert all(torch.equal(weights(model)[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())


def test_padding_is_not_counted_as_load_and_counts_move_the_bias():
    model = Transformer(TINY)
    initialise(model, 0)
    result = _step(model, [_batch(0), _batch(1)])
    assert int(result.count_LE.sum()) == 2 * (27 - 4) * TINY.num_experts_per_tok
    bias = model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.allclose(bias, 0.01 * torch.sign(result.count_LE[0].float().mean() - result.count_LE[0]))


@pytest.mark.parametrize(
    "changes", [{}, {"n_routed_experts": None}, {"attention": "gqa", "head_dim": 8}, {"tie_word_embeddings": True}]
)
def test_every_variant_learns_a_repeated_batch(changes):
    model = Transformer(TINY.replace(num_nextn_predict_layers=1, **changes))
    initialise(model, 0)
    optimizers = OptimizerSet(model, OptimizerConfig(learning_rate=1e-2))
    losses = []
    for _ in range(25):
        result = train_step(model, optimizers, [_batch()], weights=LossWeights(), bias_speed=0.0)
        losses.append(result.loss_sum / result.num_labels)
    assert losses[-1] < 0.5 * losses[0]


def test_the_bias_stands_still_at_the_end(directory):
    run(directory)
    last = load_latest(directory / "checkpoints" / "pretrain")
    assert last is not None and last.step == 12
    bias = last.tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert float(bias.abs().max()) <= 9 * CONFIG.bias_speed + 1e-9


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"precision": "fp16"}, {"bias_freeze_fraction": 2.0}, {"accumulation": 0}]
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        replace(CONFIG, **changes)
