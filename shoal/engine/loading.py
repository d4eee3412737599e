"""From a path a user names to something that generates: model, tokenizer, chat template, and the model's own card.

A model is a directory in the published layout, or a run directory, whose `model/` is meant. Nothing in it is executed:
weights are safetensors, templates run in a sandbox, the card is JSON.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint.stored_weights import StoredWeights
from shoal.config import ModelConfig
from shoal.engine.codes import floats
from shoal.errors import CheckpointError
from shoal.model.transformer import Transformer
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import Tokenizer

CARD = "shoal.json"
BUNDLED = Path(__file__).parents[1] / "bundled"
"""The model that comes with the package (`recipes/bundled.py` trained it; its card says what it can do)."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to generate. `tokenizer` and `template` are None when the directory has no tokenizer.json."""

    path: Path
    weights: StoredWeights
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    card: dict[str, Any] = field(default_factory=dict)
    """What the model says about itself: name, description, suggestions."""

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    @cached_property
    def model(self) -> Transformer:
        """The module in float32, read when first asked for: engines with packed weights never do."""
        with torch.device("meta"):
            model = Transformer(self.config)
        state = {name: floats(self.weights(name)).float() for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
        return model.to("cpu").eval()


def find_model(path: Path | None) -> Path:
    """The model directory that `path` names; None means the newest run under `runs/`, else the bundled model.

    Raises:
        CheckpointError: nothing there is a model; the message says what was looked for.
    """
    if path is None:
        runs = sorted(Path("runs").glob("*/model/config.json"), key=lambda file: file.stat().st_mtime)
        return runs[-1].parent if runs else BUNDLED
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no directory; name a model directory (config.json and safetensors) or a run directory."
        )
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} holds no config.json with safetensors; name a model directory, or a run that has finished."
        )
    return path


def load_for_generation(path: Path | None) -> LoadedModel:
    """Load the model that `path` names.

    Raises:
        CheckpointError, ConfigError, TokenizerError: missing, damaged or unsupported files.
    """
    directory = find_model(path)
    weights = StoredWeights(directory)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(directory) if has_tokenizer else None
    template = ChatTemplate.load(directory, tokenizer) if tokenizer else None
    return LoadedModel(
        path=directory, weights=weights, tokenizer=tokenizer, template=template, card=_read_card(directory / CARD)
    )


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it or restore it.") from error
    return card if isinstance(card, dict) else {}
