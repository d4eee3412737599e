"""From what a person types after `shoal plan` to the model that is planned: a name, a config.json, a directory.

Names are the published models of `planner.rivals` and the presets. A path is read as data: one JSON object of at most a
megabyte. Families that Shoal cannot compute but can count are counted: plain dense ones with grouped queries (Qwen2, Qwen3,
Mistral), and DeepSeek-V3.2 with its lightning indexer.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.checkpoint.hf_config import config_from_hf
from shoal.config import ModelConfig
from shoal.errors import ConfigError, DataError, did_you_mean
from shoal.log import read_metrics
from shoal.planner.published_models import RIVALS, rival
from shoal.planner.rivals import Rival, rival_of, with_indexer
from shoal.presets import PRESETS

MAX_CONFIG_BYTES = 1 << 20

DENSE_FAMILIES = ("qwen2", "qwen3", "mistral")
"""Counted as the Llama family; their biases and norms of queries and keys, below a ten-thousandth, are left out."""


def open_model(text: str) -> Rival:
    """The model that `text` names.

    Raises:
        ConfigError: no such name or file, or a config that cannot be.
    """
    if text in RIVALS or text in PRESETS:
        return rival(text)
    path = Path(text)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if not path.is_file():
        known = [*RIVALS, *PRESETS]
        raise ConfigError(
            f"{text!r} is neither a known model nor a config.json{did_you_mean(text, known)}; known are {', '.join(known)}, "
            "or give the path of a config.json, a model directory or a run directory."
        )
    return model_from_values(_read_object(path), path.parent.name or str(path), str(path))


def is_run_directory(text: str) -> bool:
    """Whether `text` names a run: a directory whose config.json is a recipe's, whatever else of it is missing."""
    path = Path(text)
    if text in RIVALS or text in PRESETS or not (path / "config.json").is_file():
        return False
    if (path / "metrics.jsonl").is_file() or (path / "stages.json").is_file():
        return True
    return "recipe" in _read_object(path / "config.json")


def measured_loads(run_dir: Path) -> list[list[float]]:
    """Share of tokens by layer and expert, over the whole of a run's last stage that wrote them.

    Raises:
        DataError: no metrics, or none with expert loads.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    for line in reversed(lines):
        loads = line.get("expert_load")
        if isinstance(loads, list) and loads and all(_is_row(row) for row in loads):
            return [[float(value) for value in row] for row in loads]
    raise DataError(f"{run_dir}/metrics.jsonl holds no expert loads; name a run that trains a mixture of experts.")


def _is_row(row: object) -> bool:
    return isinstance(row, list) and all(isinstance(value, int | float) and math.isfinite(value) for value in row)


def model_from_values(values: Mapping[str, Any], name: str, where: str) -> Rival:
    """The model that the content of a config.json describes.

    Raises:
        ConfigError: another family, a missing key, a value that cannot be; the message names the file.
    """
    family = values.get("model_type")
    source = f"config.json given ({where})"
    try:
        if isinstance(values.get("model"), Mapping):  # a run's own config.json
            return rival_of(name, ModelConfig.from_dict(values["model"]), source=source)
        if family is None and "kv_lora_rank" in values and "attention" in values:
            return rival_of(name, ModelConfig.from_dict(values), source=source)
        if family == "deepseek_v32":
            indexer = _indexer(values)
            return with_indexer(name, config_from_hf({**values, "model_type": "deepseek_v3"}), indexer, source)
        if str(family).startswith("deepseek_v4"):
            raise ConfigError(
                f"model_type={family!r} has no published reading of its config.json that we know; plan it by name: v4-pro, v4-flash, "
                "v4.1-flash."
            )
        if family in DENSE_FAMILIES:
            plain = {key: value for key, value in values.items() if key not in ("attention_bias", "sliding_window")}
            plain = {"rms_norm_eps": 1e-6, **plain, "model_type": "llama", "rope_scaling": None}
            return rival_of(name, config_from_hf(plain), source=source)
        return rival_of(name, config_from_hf(values), source=source, released_as=_released_as(values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _indexer(values: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, their width, and entries read, of V3.2's config.json."""
    sizes = []
    for key in ("index_n_heads", "index_head_dim", "index_topk"):
        value = values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**20:
            raise ConfigError(f"{key}={value!r} must be a whole number, at least 1; V3.2 has 64, 128 and 2048.")
        sizes.append(value)
    return sizes[0], sizes[1], sizes[2]


def _released_as(values: Mapping[str, Any]) -> Any:
    return "fp8" if values.get("quantization_config") else "bf16"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a config.json.") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is larger than 1 MiB; a config.json holds a few numbers.")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); give the config.json of a model.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold one JSON object; give the config.json of a model.")
    return values
