"""Pretraining on anybody's text: one file or a folder, the last part held out, measured in nats per character.

`variant` chooses what is compared: the mixture of experts, a dense model of the same active size, GQA instead of latent
attention, or moe and dense side by side on the same tokens in the same order.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from shoal.checkpoint.hf_format import save_model
from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.log import say
from shoal.model.transformer import Transformer, initialise
from shoal.quant.fp8_recipe import Fp8Recipe
from shoal.recipes.run import Run, only_run, write_json
from shoal.report import write_report
from shoal.text.chat_template import ChatTemplate
from shoal.text.corpus import read_documents, split_text
from shoal.text.loader import Loader, evaluation_batches
from shoal.text.shards import Shards, ShardWriter
from shoal.text.tokenizer import Tokenizer
from shoal.training.evaluate import Evaluation, evaluate, token_byte_lengths
from shoal.training.loop import Precision, TrainingConfig, train
from shoal.training.loss import LossWeights
from shoal.training.optimizer import OptimizerConfig
from shoal.training.schedule import Schedule

VARIANTS = ("moe", "dense", "gqa")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Everything that decides a text run."""

    vocab_size: int = 1024
    """265 means one token per byte, nothing merged."""
    held_out_fraction: float = 0.1
    model: ModelConfig
    batch_rows: int = 32
    row_tokens: int = 128
    training: TrainingConfig
    variants: tuple[str, ...] = ("moe",)


def text_config(
    recipe: str,
    *,
    variant: str = "moe",
    overrides: list[str],
    precision: Precision = "auto",
    fp8_wgrad: Literal["fp8", "bf16"] = "fp8",
) -> TextConfig:
    """The recipe `text`, with `key=value` overrides of the whole numbers and fractions in `SETTINGS`.

    Args:
        fp8_wgrad: with precision "fp8", what the weight gradients' products are in.
    Raises:
        ConfigError: unknown recipe, variant or key, or a value that does not fit.
    """
    if recipe != "text":
        raise ConfigError(
            f"recipe {recipe!r} is unknown to pretrain; known: text. The demo has its own verb, shoal demo."
        )
    if fp8_wgrad != "fp8" and precision != "fp8":
        raise ConfigError(f"fp8_wgrad={fp8_wgrad!r} needs precision 'fp8', not {precision!r}; set it, or leave it out.")
    if variant != "both" and variant not in VARIANTS:
        raise ConfigError(f"variant={variant!r} is unknown; use one of {', '.join(VARIANTS)} or both.")
    values = {name: _setting(name, overrides) for name in SETTINGS}
    steps = int(values["steps"])
    model = ModelConfig(
        vocab_size=int(values["vocab_size"]),
        hidden_size=int(values["width"]),
        num_hidden_layers=int(values["layers"]),
        num_attention_heads=4,
        intermediate_size=3 * int(values["width"]),
        kv_lora_rank=int(values["width"]) // 2,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=int(values["width"]) // 4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=int(values["width"]),
        max_position_embeddings=max(512, int(values["row_tokens"])),
        initializer_range=0.05,
    )
    training = TrainingConfig(
        steps=steps,
        optimizer=OptimizerConfig(
            kind="muon",
            learning_rate=values["learning_rate"],
            muon_learning_rate=values["muon_learning_rate"],
            weight_decay=values["weight_decay"],
        ),
        schedule=Schedule(kind="wsd", warmup_steps=min(20, int(0.4 * steps)), total_steps=steps, decay_fraction=0.6),
        weights=LossWeights(mtp=0.0),
        bias_speed=3e-3,
        precision=precision,
        fp8=Fp8Recipe(wgrad=fp8_wgrad),
        seed=int(values["seed"]),
        log_every=5,
        evaluate_every=max(1, steps // 4),
        checkpoint_every=100,
    )
    return TextConfig(
        vocab_size=int(values["vocab_size"]),
        model=model,
        batch_rows=int(values["batch_rows"]),
        row_tokens=int(values["row_tokens"]),
        training=training,
        variants=("moe", "dense") if variant == "both" else (variant,),
    )


SETTINGS: dict[str, float] = {
    "steps": 620,
    "vocab_size": 512,
    "width": 192,
    "layers": 4,
    "batch_rows": 32,
    "row_tokens": 128,
    "learning_rate": 3e-3,
    "muon_learning_rate": 0.01,
    "weight_decay": 0.1,
    "seed": 0,
}
"""What `--set` may change, with the defaults."""


def run_text(run_dir: Path, data: list[Path], config: TextConfig, *, text_key: str = "text") -> dict[str, Any]:
    """Train every variant on the same text; returns their held-out figures, also written to `text.json`."""
    with only_run():
        settings = {
            "recipe": "text",
            "seed": config.training.seed,
            "data": [str(path) for path in data],
            **asdict(config),
        }
        run = Run(run_dir, settings)
        tokenizer, held_out_chars = _prepare(run, data, config, text_key)
        results = {}
        for variant in config.variants:
            path = run_dir / f"{variant}.json"
            if not run.is_done(variant):
                with run.stage(variant, f"pretrain {variant}") as facts:
                    figures = _train_variant(run_dir, variant, config, tokenizer, held_out_chars)
                    write_json(path, figures)
                    facts["tokens"] = figures["tokens"]
                    facts["result"] = (
                        f"held out {figures['nats_per_character']:.3f} nats per character, {figures['bits_per_byte']:.3f} bits per byte"
                    )
            results[variant] = json.loads(path.read_text(encoding="utf-8"))
        write_json(run_dir / "text.json", results)
        write_report(run_dir)
        return results


def variant_config(base: ModelConfig, variant: str) -> ModelConfig:
    """The model of a variant, with as many active parameters per token as the mixture has."""
    if variant == "moe":
        return base
    active_width = (base.num_experts_per_tok + base.n_shared_experts) * base.moe_intermediate_size
    dense = base.replace(n_routed_experts=None, intermediate_size=active_width)
    return (
        dense
        if variant == "dense"
        else dense.replace(attention="gqa", num_key_value_heads=base.num_attention_heads // 2)
    )


def _prepare(run: Run, data: list[Path], config: TextConfig, text_key: str) -> tuple[Tokenizer, int]:
    """Tokenizer and shards, made once; returns the tokenizer and the characters held out."""
    directory = run.directory
    if not run.is_done("data"):
        with run.stage("data", "read, split and tokenise the text") as facts:
            text = "\n\n".join(read_documents(data, text_key=text_key))
            training, held_out = split_text(text, config.held_out_fraction)
            tokenizer = Tokenizer.train([training], config.vocab_size)
            tokenizer.save(directory / "tokenizer")
            facts["held_out_characters"] = len(held_out)
            for name, part in (("train", training), ("held_out", held_out)):
                writer = ShardWriter(
                    directory / "shards" / name, vocab_size=tokenizer.vocab_size, tokenizer_digest=tokenizer.digest
                )
                writer.add(tokenizer.encode(part))
                facts[f"{name}_tokens"] = writer.close().num_tokens
            facts["result"] = f"{len(text)} characters, {facts['train_tokens']} training tokens"
    return Tokenizer.load(directory / "tokenizer"), int(run.stages["data"]["held_out_characters"])


def _train_variant(
    directory: Path, variant: str, config: TextConfig, tokenizer: Tokenizer, held_out_chars: int
) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = Transformer(variant_config(config.model.replace(vocab_size=tokenizer.vocab_size, **ids), variant))
    initialise(model, config.training.seed)
    shards = {
        name: Shards.open(directory / "shards" / name, expected_digest=tokenizer.digest)
        for name in ("train", "held_out")
    }
    layout: dict[str, Any] = {"batch_rows": config.batch_rows, "row_tokens": config.row_tokens, "mode": "stream"}
    bytes_of_token = token_byte_lengths(tokenizer)

    def held_out() -> Evaluation:
        found = evaluate(model, evaluation_batches(shards["held_out"], **layout), bytes_of_token)
        say(f"  {variant}: held out {found.loss * found.num_tokens / held_out_chars:.3f} nats per character")
        return found

    loader = Loader(shards["train"], seed=config.training.seed, **layout)
    result = train(model, config.training, loader, directory, stage=variant, evaluate=held_out)
    target = directory / ("model" if variant == config.variants[0] else f"model-{variant}")
    save_model(target, model.config, model.state_dict(), dtype=torch.float32)
    tokenizer.save(target)
    ChatTemplate.default(tokenizer).save(target)
    assert result.evaluation is not None
    return {
        "nats_per_character": result.evaluation.loss * result.evaluation.num_tokens / held_out_chars,
        "bits_per_byte": result.evaluation.bits_per_byte,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": result.tokens,
        "wall_s": result.wall_s,
    }


def _setting(name: str, overrides: list[str]) -> float:
    """The default of a setting, or what the last override says."""
    value = SETTINGS[name]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or key not in SETTINGS:
            raise ConfigError(f"--set {override!r}: use key=value with one of {', '.join(SETTINGS)}.")
        if key == name:
            try:
                value = float(text)
            except ValueError as error:
                raise ConfigError(f"--set {override!r}: {text!r} is no number.") from error
            if value < 0 or (isinstance(SETTINGS[name], int) and value != int(value)):
                raise ConfigError(
                    f"--set {override!r}: {name} must be a {'whole ' if isinstance(SETTINGS[name], int) else ''}number of at least 0."
                )
    return value
