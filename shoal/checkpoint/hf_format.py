"""A model directory in the published DeepSeek layout: the one model format, read and written.

`config.json`, safetensors with per-expert keys, and beside them tokenizer and chat template. What is written here opens
in transformers, vLLM and SGLang as it is; what DeepSeek, Moonshot and their kin publish opens here, FP8 blocks included.
Reading is strict (every key accounted for, every shape checked before the first byte of weights is copied) and streams
one tensor at a time. `checksums.json`, written along and verified when present, notices truncated and altered files.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.checkpoint.atomic import check_sums, sums_of, whole_directory
from shoal.checkpoint.hf_config import config_from_hf, config_to_hf, published_family
from shoal.checkpoint.hf_layout import Entry, layout, prediction_prefix, repeated_keys
from shoal.checkpoint.quantised import check_layout
from shoal.checkpoint.weight_files import COMPANIONS, INDEX, WeightFiles, config_values, json_object
from shoal.config import ModelConfig
from shoal.errors import CheckpointError
from shoal.log import say

__all__ = ["config_from_hf", "config_to_hf", "load_config", "load_model", "load_state", "save_model", "stream_state"]

CHECKSUMS = "checksums.json"
_SHOWN = 4
"""Keys named in a message; the rest are counted."""


class SavesInto(Protocol):
    """Something that writes its files into a model directory: a tokenizer, a chat template."""

    def save(self, directory: Path) -> None: ...


def load_config(directory: Path) -> ModelConfig:
    """The config of a model directory.

    Raises:
        CheckpointError: there is no readable config.json.
        ConfigError: it describes a model that cannot be built here.
    """
    return config_from_hf(config_values(directory))


def load_model(
    directory: Path, *, dtype: torch.dtype | None = None, verify: bool = True
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and state of a model directory, for `Transformer(config).load_state_dict(state, assign=True)`.

    A file that promises multi-token prediction but holds none of it (transformers drops it when saving) is read without,
    and a line says so.

    Args:
        dtype: of the tensors; None keeps what is stored (FP8 becomes bfloat16). The balance bias stays float32.
        verify: compare with `checksums.json` when there is one.
    Raises:
        CheckpointError: files missing, damaged or altered; tensors missing, left over or of wrong shape.
        ConfigError: the config describes a model that cannot be built here.
    """
    config = load_config(directory)
    if verify:
        verify_sums(directory)
    config = present_config(WeightFiles(directory), config)
    return config, dict(stream_state(directory, config, dtype=dtype))


def present_config(files: WeightFiles, config: ModelConfig) -> ModelConfig:
    """The config without prediction layers when the files hold none of them; a line says so."""
    depth = config.num_nextn_predict_layers
    prefixes = tuple(prediction_prefix(config, k) for k in range(depth))
    if not depth or any(key.startswith(prefixes) for key in files.stored_keys()):
        return config
    say(
        f"{files.directory}: num_nextn_predict_layers={depth}, but the files hold no such layers; reading without them."
    )
    return config.replace(num_nextn_predict_layers=0)


def load_state(directory: Path, config: ModelConfig, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a model directory under the model's own names; see `stream_state`."""
    return dict(stream_state(directory, config, dtype=dtype))


def stream_state(
    directory: Path, config: ModelConfig, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor one after the other; all keys and shapes are checked before the first.

    Raises:
        CheckpointError: as for `load_model`.
    """
    files = WeightFiles(directory)
    entries = layout(config)
    check_model(files, config)
    for entry in entries:
        yield entry.name, read_entry(files, entry, torch.float32 if entry.is_float32 else dtype)


def save_model(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5_000_000_000,
    beside: Iterable[SavesInto] = (),
) -> None:
    """Write a model directory, whole or not at all; an older model there is replaced, its tokenizer files stay.

    Args:
        state: the model's `state_dict()`.
        dtype: stored dtype; the balance bias stays float32.
        max_shard_bytes: larger models are cut into several files with an index.
        beside: what else to save into the same directory, such as the tokenizer.
    Raises:
        CheckpointError: tensors that do not fit the config, or a directory that holds something else.
        DiskFullError: no room; nothing half-written stays.
    """
    entries = layout(config)
    _check_state(entries, state)
    kept = _files_to_keep(directory)
    family, why = published_family(config)
    if why is not None:
        say(f"{directory}: written as model_type {family!r}, which only Shoal opens: {why}.")
    with whole_directory(directory) as temporary:
        for path in kept:
            shutil.copy2(path, temporary / path.name)
        text = json.dumps(config_to_hf(config, dtype=dtype), indent=2)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        _write_shards(temporary, entries, repeated_keys(config), state, dtype, max_shard_bytes)
        written = [path.name for path in temporary.iterdir() if _is_ours(path.name)]
        (temporary / CHECKSUMS).write_text(json.dumps(sums_of(temporary, written), indent=1), encoding="utf-8")
        for item in beside:
            item.save(temporary)


def _write_shards(
    directory: Path,
    entries: list[Entry],
    repeats: Mapping[str, str],
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Cut the published tensors into files in order, one file in memory at a time."""
    makers: dict[str, Callable[[], Tensor]] = {}
    sizes: dict[str, int] = {}
    for entry in entries:
        stored = torch.float32 if entry.is_float32 else dtype
        for part in entry.parts:
            makers[part.key] = partial(_own_copy, state[entry.name], part.index, stored)
            sizes[part.key] = torch.Size(part.shape).numel() * stored.itemsize
    for key, original in repeats.items():
        makers[key], sizes[key] = makers[original], sizes[original]
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for key, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(key)
        room -= size
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: makers[key]() for key in keys}, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _own_copy(tensor: Tensor, index: tuple[int | slice, ...], dtype: torch.dtype) -> Tensor:
    # safetensors refuses tensors that share memory, as two halves of a fused matrix do.
    return tensor.detach()[index].to("cpu", dtype, copy=True).contiguous()


def _check_state(entries: list[Entry], state: Mapping[str, Tensor]) -> None:
    wanted = {entry.name: entry.shape for entry in entries}
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"the tensors do not fit the config: missing {_some(missing)}, left over {_some(extra)}; "
            "pass the state_dict() of a Transformer of this config."
        )
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(f"{name} has shape {list(state[name].shape)}; this config wants {list(shape)}.")


def _files_to_keep(directory: Path) -> list[Path]:
    """Files of others in a model directory that is about to be replaced. Anything else is not touched."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; name a directory for the model.")
    paths = sorted(directory.iterdir())
    is_model = any(path.name in ("config.json", "tokenizer.json") for path in paths)
    if paths and (not is_model or any(path.is_dir() for path in paths)):
        raise CheckpointError(f"{directory} holds something that is no model; name an empty or a new directory.")
    return [path for path in paths if not _is_ours(path.name) and path.name != CHECKSUMS]


def _is_ours(name: str) -> bool:
    return name in ("config.json", INDEX) or name.endswith(".safetensors")


def check_model(files: WeightFiles, config: ModelConfig) -> None:
    """Every tensor of the config is there with its shape, and nothing else.

    Raises:
        CheckpointError: it is not; the message names tensors.
    """
    wanted = {part.key: part.shape for entry in layout(config) for part in entry.parts}
    missing = [key for key in wanted if key not in files]
    repeats = {"lm_head.weight", *repeated_keys(config)}
    extra = [key for key in files.stored_keys() if key not in wanted and not _may_ignore(key, wanted, repeats)]
    if missing or extra:
        raise CheckpointError(
            f"{files.directory} does not fit its config.json: missing {_some(missing)}, left over {_some(extra)}. "
            "Check num_hidden_layers, n_routed_experts, first_k_dense_replace, num_nextn_predict_layers and "
            "tie_word_embeddings, or copy the model again."
        )
    for key, shape in wanted.items():
        if files.shape(key) != shape:
            raise CheckpointError(
                f"{key} in {files.directory} has shape {list(files.shape(key))}; its config.json wants {list(shape)}."
            )


def _may_ignore(key: str, wanted: Mapping[str, Any], repeats: set[str]) -> bool:
    """Copies of embedding and head, what lies beside quantised weights, and the frequency tables of old files."""
    bases = (key.removesuffix(suffix) for suffix in COMPANIONS if key.endswith(suffix))
    is_companion = any(base in wanted or base in repeats for base in bases)
    return is_companion or key in repeats or key.endswith("rotary_emb.inv_freq")


def read_entry(files: WeightFiles, entry: Entry, dtype: torch.dtype | None) -> Tensor:
    """One parameter put together from its published tensors; `dtype` None keeps what is stored."""
    first = files.tensor(entry.parts[0].key)
    if len(entry.parts) == 1:
        return first.to(dtype or first.dtype)
    whole = torch.empty(entry.shape, dtype=dtype or first.dtype)
    for part in entry.parts:
        whole[part.index] = files.tensor(part.key)
    return whole


def verify_sums(directory: Path) -> dict[str, str]:
    """Compare every file with `checksums.json`, where there is one, and a quantised directory's layout version.

    Returns the sums of the files that were compared.

    Raises:
        CheckpointError: altered, damaged or of another layout; names what to do.
    """
    command = check_layout(directory)
    if not (directory / CHECKSUMS).is_file():
        return {}
    sums = json_object(directory / CHECKSUMS)
    try:
        check_sums(directory, sums)
    except CheckpointError as error:
        again = f" Build it again: {command}" if command else f" If you changed it on purpose, delete {CHECKSUMS}."
        raise CheckpointError(f"{error}{again}") from error
    return sums


def _some(keys: list[str]) -> str:
    if not keys:
        return "nothing"
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
