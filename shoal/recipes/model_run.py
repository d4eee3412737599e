"""A run directory of models that share a tokenizer: the base, and what each later stage made of it, by name.

Recipes are lists of stages; each stage leaves files that the next one reads, and is skipped when it is done already.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint.hf_format import load_model, save_model
from shoal.config import ModelConfig
from shoal.log import say
from shoal.model.layers import compute_dtype, set_compute_dtype
from shoal.model.transformer import Transformer, initialise
from shoal.recipes.run import Run, write_json
from shoal.rl.rollout import Prompter
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import Tokenizer


class ModelRun:
    """Stages, and the models they leave.

    Args:
        settings: everything that decides the outcome, as JSON values; resuming demands the same.
        estimates_s: seconds each stage is expected to take, by name up to the first dash.
        precision: of matrix products in models that `load` returns.
    Raises:
        CheckpointError: the directory belongs to another configuration.
    """

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], estimates_s: Mapping[str, float], precision: str = "auto"
    ) -> None:
        self.dir, self.estimates_s, self.precision = directory, estimates_s, precision
        self.log = Run(directory, settings)

    def stage(self, name: str, title: str, work: Callable[[dict[str, Any]], None]) -> None:
        """Do a stage unless it is done; what `work` puts into the dict is kept with its time and energy."""
        if self.log.is_done(name):
            say(f"[{name}] already done")
            return
        with self.log.stage(name, title, self.estimates_s.get(name.split("-")[0])) as facts:
            work(facts)

    def new(self, config: ModelConfig, seed: int) -> Transformer:
        """A fresh model for this run's tokenizer."""
        tokenizer = self.tokenizer()
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = Transformer(config.replace(vocab_size=tokenizer.vocab_size, **ids))
        initialise(model, seed)
        return model

    def save(self, name: str, model: Transformer) -> None:
        """Keep a model, float32."""
        save_model(self.dir / name, model.config, model.state_dict(), dtype=torch.float32)

    def load(self, name: str) -> Transformer:
        """A kept model, ready to sample or to train on."""
        config, state = load_model(self.dir / name)
        model = Transformer(config)
        model.load_state_dict(state)
        set_compute_dtype(model, compute_dtype(self.precision, model.embed_tokens.weight.device))
        return model.eval()

    def export(self, name: str, card: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Path:
        """Write a kept model as `model/`: self-contained, with tokenizer, template, and card with the weights' digest."""
        config, state = load_model(self.dir / name)
        target = self.dir / "model"
        save_model(target, config, state, dtype=dtype)
        tokenizer = self.tokenizer()
        tokenizer.save(target)
        ChatTemplate.default(tokenizer).save(target)
        weights = hashlib.sha256()
        for file in sorted(target.glob("*.safetensors")):
            weights.update(file.read_bytes())
        write_json(target / "shoal.json", {**card, "weights_sha256": weights.hexdigest()})
        return target

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, trained by an earlier stage."""
        return Tokenizer.load(self.dir / "tokenizer")

    def template(self) -> ChatTemplate:
        """How conversations are written."""
        return ChatTemplate.default(self.tokenizer())

    def prompter(self) -> Prompter:
        """Problems as prompts, answers as text."""
        tokenizer = self.tokenizer()
        return Prompter(tokenizer, ChatTemplate.default(tokenizer))
