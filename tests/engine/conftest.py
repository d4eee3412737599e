"""One small model, really trained, for all equalities: near-ties and peaked distributions are where they break."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from shoal.model.layers import set_compute_dtype
from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset
from shoal.recipes.problem_corpus import arithmetic_lines
from shoal.text.packing import Batch
from shoal.text.tokenizer import Tokenizer
from shoal.training.loss import LossWeights
from shoal.training.optimizer import OptimizerConfig, OptimizerSet
from shoal.training.step import train_step

ROWS, ROW_TOKENS, STEPS = 8, 64, 80


@dataclass(frozen=True)
class Trained:
    """A model that writes sums, its tokenizer, and the text it read."""

    model: Transformer
    tokenizer: Tokenizer
    token_ids: list[int]
    first_loss: float
    last_loss: float
    mtp_acceptance: float


@pytest.fixture(scope="session")
def trained() -> Trained:
    """Two narrow layers trained on lines of arithmetic for a few seconds, prediction module and all."""
    rng = random.Random(0)
    text = "\n".join(arithmetic_lines(rng) for _ in range(1000))
    tokenizer = Tokenizer.train([text], 280)
    config = preset("demo").replace(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        n_routed_experts=4,
        moe_intermediate_size=48,
        max_position_embeddings=1024,
        initializer_range=0.05,
    )
    model = Transformer(config)
    initialise(model, 0)
    token_ids = tokenizer.encode(text)
    optimizers = OptimizerSet(model, OptimizerConfig(learning_rate=8e-3, weight_decay=0.0))
    results = [
        train_step(model, optimizers, [_batch(token_ids, rng)], weights=LossWeights(), bias_speed=3e-3)
        for _ in range(STEPS)
    ]
    losses = [result.loss_sum / result.num_labels for result in results]
    last = results[-10:]
    acceptance = sum(result.accepted for result in last) / sum(result.drafted for result in last)
    set_compute_dtype(model, torch.bfloat16)
    return Trained(model.eval(), tokenizer, token_ids, losses[0], losses[-1], acceptance)


def _batch(token_ids: list[int], rng: random.Random) -> Batch:
    starts = [rng.randrange(len(token_ids) - ROW_TOKENS - 1) for _ in range(ROWS)]
    token_BS, label_BS = (
        np.array([token_ids[start + ahead : start + ahead + ROW_TOKENS] for start in starts]) for ahead in (0, 1)
    )
    return Batch(
        token_BS=token_BS,
        label_BS=label_BS,
        document_BS=np.zeros_like(token_BS),
        position_BS=np.broadcast_to(np.arange(ROW_TOKENS), token_BS.shape).copy(),
    )
