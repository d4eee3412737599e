"""Supervised fine-tuning: a trained model, conversations in JSON lines, loss on the answers alone.

The tokenizer and the chat template are the model's own. A share of the examples is held out by a hash of the question, so
that the same question never stands on both sides. Multi-token prediction is trained along, where the model has it, and its
acceptance on the held-out answers is measured, so that drafts stay good for speculative decoding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint.hf_format import save_model
from shoal.engine.loading import LoadedModel, load_for_generation
from shoal.errors import ConfigError, DataError
from shoal.log import say
from shoal.recipes.document_training import train_on_documents
from shoal.recipes.run import Run, only_run, write_json
from shoal.report import write_report
from shoal.text.conversations import EncodedExample, encode_example, read_examples
from shoal.text.loader import plan_packed
from shoal.text.shards import Shards, ShardWriter
from shoal.text.tokenizer import Tokenizer
from shoal.training.loop import TrainingConfig
from shoal.training.loss import LossWeights
from shoal.training.optimizer import OptimizerConfig
from shoal.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """Everything that decides a fine-tuning run, beside model and data."""

    steps: int = 100
    learning_rate: float = 3e-4
    """Peak of AdamW; a tenth of pretraining's keeps most of what was learnt."""
    batch_rows: int = 8
    """Fewer where the examples do not fill as many."""
    row_tokens: int = 0
    """0: the longest example, rounded up to 64, at most the model's context."""
    held_out_fraction: float = 0.05
    mtp_weight: float = 0.1
    bias_speed: float = 1e-3
    """Of expert balancing."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_rows) < 1 or self.row_tokens < 0:
            raise ConfigError(f"steps={self.steps} and batch_rows={self.batch_rows} must be at least 1.")
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(f"held_out_fraction={self.held_out_fraction} must be between 0 and 1.")
        if self.learning_rate <= 0 or self.mtp_weight < 0:
            raise ConfigError(f"learning_rate={self.learning_rate} must be positive, mtp_weight not negative.")


def fine_tune(run_dir: Path, model: Path | None, data: Sequence[Path], config: FineTuningConfig) -> dict[str, Any]:
    """Train on the answers; leaves `model/` in the run directory and returns its held-out figures.

    Raises:
        CheckpointError: no such model, or the directory holds another run.
        DataError: files or lines that are no examples, or longer than the model's context.
    """
    with only_run():
        loaded = load_for_generation(model)
        run = Run(
            run_dir,
            {
                "recipe": "sft",
                "base": str(loaded.path.resolve()),
                "model": loaded.config.to_dict(),
                "data": [str(path) for path in data],
                **asdict(config),
            },
        )
        tokenizer, row_tokens = _prepare(run, loaded, data, config)
        if not run.is_done("sft"):
            with run.stage("sft", "fine-tune on the answers") as facts:
                facts |= _train(run_dir, loaded, tokenizer, row_tokens, config)
                facts["result"] = f"held-out answers: {facts['loss']:.3f} nats per token"
        write_json(run_dir / "sft.json", {name: run.stages["sft"][name] for name in FIGURES})
        write_report(run_dir)
        return {name: run.stages["sft"][name] for name in FIGURES} | {"model": str(run_dir / "model")}


FIGURES = ("loss", "bits_per_byte", "mtp_acceptance", "tokens", "steps", "skipped_steps")


def _prepare(run: Run, loaded: LoadedModel, data: Sequence[Path], config: FineTuningConfig) -> tuple[Tokenizer, int]:
    """Shards of the examples; returns the tokenizer and the row length."""
    if loaded.tokenizer is None or loaded.template is None:
        raise ConfigError(f"{loaded.path} has no tokenizer.json; fine-tuning on text needs the model's tokenizer.")
    if not run.is_done("data"):
        with run.stage("data", "read and tokenise the conversations") as facts:
            examples = read_examples(data)
            encoded = [encode_example(example, loaded.tokenizer, loaded.template) for example in examples]
            longest = max(range(len(encoded)), key=lambda i: len(encoded[i].token_ids))
            length, context = len(encoded[longest].token_ids), loaded.model.config.max_position_embeddings
            limit = min(config.row_tokens or context, context)
            if length > limit:
                raise DataError(
                    f"{examples[longest].where}: the example has {length} tokens, rows have room for {limit}; shorten it, "
                    "or raise row_tokens up to the model's context."
                )
            held = [_is_held_out(example.messages, config.held_out_fraction) for example in examples]
            if all(held) or not any(held):  # too few examples for a fraction: the last one is held out
                held = [place == len(examples) - 1 for place in range(len(examples))]
            for name, wanted in (("train", False), ("held_out", True)):
                part = [item for item, is_held in zip(encoded, held) if is_held is wanted]
                _write(run.directory / "shards" / name, part, loaded.tokenizer)
            facts["row_tokens"] = config.row_tokens or min(-(-length // 64) * 64, context)
            facts["result"] = f"{len(examples)} answers, {sum(held)} of them held out"
    return loaded.tokenizer, int(run.stages["data"]["row_tokens"])


def _is_held_out(messages: Sequence[Any], fraction: float) -> bool:
    digest = hashlib.sha256(repr([message["content"] for message in messages]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _write(directory: Path, examples: Sequence[EncodedExample], tokenizer: Tokenizer) -> None:
    if not examples:
        raise DataError("a single example cannot be both learnt and held out; give at least two.")
    writer = ShardWriter(directory, vocab_size=tokenizer.vocab_size, tokenizer_digest=tokenizer.digest)
    for example in examples:
        writer.add(example.token_ids, example.is_answer)
    writer.close()


def _train(
    run_dir: Path, loaded: LoadedModel, tokenizer: Tokenizer, row_tokens: int, config: FineTuningConfig
) -> dict[str, Any]:
    """The stage itself; saves the model beside its tokenizer, template and card."""
    training = TrainingConfig(
        steps=config.steps,
        optimizer=OptimizerConfig(learning_rate=config.learning_rate, weight_decay=0.0),
        schedule=Schedule(
            kind="cosine", warmup_steps=min(10, config.steps // 5), total_steps=config.steps, min_fraction=0.1
        ),
        weights=replace(LossWeights(), mtp=config.mtp_weight),
        bias_speed=config.bias_speed,
        seed=config.seed,
        log_every=5,
    )
    rows = len(plan_packed(Shards.open(run_dir / "shards" / "train"), row_tokens, config.seed))
    result = train_on_documents(
        loaded.model.train(),
        training,
        run_dir / "shards",
        tokenizer,
        run_dir,
        stage="sft",
        batch_rows=min(config.batch_rows, rows),
        row_tokens=row_tokens,
    )
    target = run_dir / "model"
    save_model(target, loaded.model.config, loaded.model.state_dict(), dtype=torch.float32)
    tokenizer.save(target)
    assert loaded.template is not None and result.evaluation is not None
    loaded.template.save(target)
    if loaded.card:
        write_json(target / "shoal.json", loaded.card)
    say(f"model: {target}")
    return {
        "loss": result.evaluation.loss,
        "bits_per_byte": result.evaluation.bits_per_byte,
        "mtp_acceptance": result.evaluation.mtp_acceptance,
        "tokens": result.tokens,
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
    }
