"""Held-out loss, in units that can be compared: nats per token, bits per byte, nats per character.

Loss per token depends on the tokenizer; bits per byte does not, so it is what runs are compared by.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from shoal.model.load_balance import max_violation
from shoal.model.transformer import Transformer
from shoal.text.packing import Batch
from shoal.text.tokenizer import Tokenizer
from shoal.training.loss import IGNORED, LossWeights, batch_loss, mtp_acceptance
from shoal.training.step import CountTracker, tensors_of


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out figures over every label of the given batches."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    mtp_acceptance: float | None
    max_violation: float | None
    """MaxVio over the whole held-out set (the papers' global MaxVio), worst layer."""


def token_byte_lengths(tokenizer: Tokenizer) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """UTF-8 bytes that each token id stands for; special tokens stand for none."""
    return np.array([tokenizer.num_bytes(token) for token in range(tokenizer.vocab_size)], dtype=np.int64)


@torch.no_grad()
def evaluate(
    model: Transformer, batches: Iterable[Batch], bytes_of_token: "np.ndarray[tuple[int], np.dtype[np.int64]]"
) -> Evaluation:
    """Mean loss over the labels of `batches`."""
    total, labels, num_bytes, accepted, drafted = 0.0, 0, 0, 0, 0
    tracker = CountTracker(model)
    device = model.embed_tokens.weight.device
    for batch in batches:
        loss = batch_loss(model, *tensors_of(batch, device), weights=LossWeights(), step_tokens=1)
        total += float(loss.main.total)
        labels += loss.main.num_tokens
        num_bytes += int(bytes_of_token[batch.label_BS[batch.label_BS != IGNORED]].sum())
        tracker.add(loss.routing)
        for part_accepted, part_drafted in mtp_acceptance(loss.main, loss.mtp)[:1]:
            accepted += part_accepted
            drafted += part_drafted
    mean = total / max(labels, 1)
    return Evaluation(
        loss=mean,
        bits_per_byte=total / math.log(2) / max(num_bytes, 1),
        num_tokens=labels,
        num_bytes=num_bytes,
        mtp_acceptance=accepted / drafted if drafted else None,
        max_violation=float(max_violation(tracker.count_LE).max()) if tracker.layers else None,
    )
