"""Training checkpoints: everything that decides the next step, bit for bit, and never half of it.

A checkpoint is a directory `step-00000123/` with tensors (safetensors: no pickle, nothing in it can run), plain values
(`state.json`) and the checksums of both (`manifest.json`). It appears by one rename, so a kill at any moment leaves the
previous one usable; damaged ones are passed over with a warning. Weights and optimizer moments are stored under parameter
*names*, so that a reordered model does not silently swap them. Tensors that share memory (tied weights) are stored once
and share memory again when loaded.

Differs from the plan: one process writes; sharded training goes through torch.distributed.checkpoint.
"""

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.checkpoint.atomic import check_sums, remove_tree, sums_of, whole_directory
from shoal.errors import CheckpointError
from shoal.log import say

_STEP_DIRECTORY = re.compile(r"step-(\d{8,})(\.old)?")
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was saved."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write `directory/step-<step>/`, then remove all but the `keep` newest.

    Args:
        tensors: of any dtype that safetensors knows, on any device, also 0-dimensional, empty or sharing memory.
        state: JSON values.
    Raises:
        DiskFullError: no room; the checkpoints already there are untouched.
        CheckpointError: a dtype or value that cannot be stored.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"step={step} must not be negative and keep={keep} must be at least 1.")
    target = directory / f"step-{step:08d}"
    stored, aliases = _without_sharing(tensors)
    try:
        text = json.dumps({"step": step, "aliases": aliases, "state": state})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state of a checkpoint must be JSON values: {error}.") from error
    with whole_directory(target) as temporary:
        try:
            save_file(stored, temporary / "tensors.safetensors")
        except KeyError as error:
            raise CheckpointError(f"safetensors cannot store tensors of dtype {error}; convert them first.") from error
        (temporary / "state.json").write_text(text, encoding="utf-8")
        sums = sums_of(temporary, ("tensors.safetensors", "state.json"))
        manifest = json.dumps({"format": _FORMAT, "sha256": sums}, indent=1)
        (temporary / "manifest.json").write_text(manifest, encoding="utf-8")
    _prune(directory, keep)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint directory and check it against its manifest.

    Raises:
        CheckpointError: it is missing, incomplete, damaged or of another format.
    """
    manifest = _read_json(path / "manifest.json")
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {manifest.get('format')!r}; this version reads {_FORMAT}.")
    sums = manifest.get("sha256")
    if not isinstance(sums, dict) or set(sums) != {"tensors.safetensors", "state.json"}:
        raise CheckpointError(f"{path}/manifest.json does not list the checkpoint's files; use another checkpoint.")
    check_sums(path, sums)
    try:
        tensors = load_file(path / "tensors.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}/tensors.safetensors cannot be read: {error}.") from error
    values = _read_json(path / "state.json")
    tensors |= {alias: tensors[name] for alias, name in values["aliases"].items()}
    return Checkpoint(path=path, step=values["step"], tensors=tensors, state=values["state"])


def load_latest(directory: Path, *, config: Mapping[str, Any] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning. None when there is none at all.

    Args:
        config: when given, must equal the checkpoint's `state["identity"]`.
    Raises:
        CheckpointError: checkpoints exist but all are damaged, or the configuration differs.
    """
    found = _step_directories(directory)
    for path in reversed(found):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            say(f"warning: passing over a damaged checkpoint. {error}")
            continue
        if config is not None:
            check_same_config(checkpoint.state.get("identity", {}), config)
        return checkpoint
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {directory} can be read; remove the directory to start over."
        )
    return None


def check_same_config(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a run under another configuration.

    Raises:
        CheckpointError: names every differing key with both values.
    """
    before, now = _flat(saved), _flat(wanted)
    different = [key for key in sorted(before.keys() | now.keys()) if before.get(key, "-") != now.get(key, "-")]
    if different:
        lines = "; ".join(
            f"{key} was {before.get(key, 'absent')!r}, is {now.get(key, 'absent')!r}" for key in different
        )
        raise CheckpointError(
            f"this run was started with another configuration: {lines}. "
            "Resume with the old values, or start a new run directory."
        )


def flatten_optimizer_state(
    optimizer: torch.optim.Optimizer, named_parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors named `<parameter>/<entry>` and JSON values, for AdamW, Muon and their like.

    Args:
        named_parameters: the model's; may hold more than this optimizer moves.
    """
    name_of = {id(parameter): name for name, parameter in named_parameters.items()}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, entries in optimizer.state.items():
        name = _name(name_of, parameter)
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{entry}"] = value
            else:
                plain.setdefault(name, {})[entry] = value
    groups = [
        {
            "parameters": [_name(name_of, parameter) for parameter in group["params"]],
            "options": {key: value for key, value in group.items() if key != "params"},
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"plain": plain, "groups": groups}


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named_parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """The inverse of `flatten_optimizer_state`, into an optimizer over the same parameters.

    Raises:
        CheckpointError: the optimizer's groups hold other parameters than the saved ones did.
    """
    name_of = {id(parameter): name for name, parameter in named_parameters.items()}
    groups = [[_name(name_of, parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    saved_groups = [group["parameters"] for group in values["groups"]]
    if sorted(map(sorted, groups)) != sorted(map(sorted, saved_groups)):
        missing = sorted({name for group in groups for name in group} ^ {n for group in saved_groups for n in group})
        raise CheckpointError(
            f"the saved optimizer moved other parameters, or grouped them otherwise; differing: {missing[:5] or 'grouping'}. "
            "Resume with the model and optimizer the run was started with."
        )
    options_of = {tuple(sorted(group["parameters"])): group["options"] for group in values["groups"]}
    for group, names in zip(optimizer.param_groups, groups):
        options = options_of[tuple(sorted(names))]
        # JSON has no tuples; an option that was one (betas) becomes one again.
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()})
    entries_of: dict[str, dict[str, Any]] = {name: dict(plain) for name, plain in values["plain"].items()}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        entries_of.setdefault(name, {})[entry] = tensor
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entries = entries_of.get(_name(name_of, parameter))
            if entries:
                optimizer.state[parameter] = {
                    entry: value.to(_home(entry, group, parameter), copy=True) if isinstance(value, Tensor) else value
                    for entry, value in entries.items()
                }


def _home(entry: str, group: Mapping[str, Any], parameter: Tensor) -> torch.device:
    """Step counters live on the CPU unless a fused or captured rule reads them on the device."""
    on_cpu = entry == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if on_cpu else parameter.device


def capture_random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The random states of Python and torch (CPU and every GPU), as tensors and JSON values."""
    version, internal, gauss = random.getstate()
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"torch_cuda_{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": [version, list(internal), gauss]}


def restore_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """The inverse of `capture_random_state`; states of GPUs that this machine lacks are left out."""
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(tensors["torch_cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"torch_cuda_{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"torch_cuda_{index}"], index)


def _without_sharing(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors, none sharing memory with another, and which names stood for the same one."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_of: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first_of:
            aliases[name] = first_of[place]
            continue
        first_of[place] = name
        storage = tensor.untyped_storage().data_ptr()
        overlaps = storage in storages
        storages.add(storage)
        tensor = tensor.cpu().contiguous()
        stored[name] = tensor.clone() if overlaps else tensor
    return stored, aliases


def _prune(directory: Path, keep: int) -> None:
    found = _step_directories(directory)
    current = [path for path in found if not path.name.endswith(".old")]
    for path in set(found) - set(current[-keep:]):
        remove_tree(path)
    for path in directory.glob(".step-*.writing"):
        remove_tree(path)


def _step_directories(directory: Path) -> list[Path]:
    """Checkpoints from oldest to newest; an `.old` one (a kill while it was replaced) counts before its namesake."""
    if not directory.is_dir():
        return []
    matches = [(_STEP_DIRECTORY.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    found = [(int(match[1]), match[2] is None, path) for match, path in matches if match]
    return [path for _, _, path in sorted(found)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {path.parent} is no complete checkpoint.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return values


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted keys; tuples and lists alike, since JSON knows only lists."""
    if isinstance(values, Mapping):
        return {key: v for name, value in values.items() for key, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix[:-1]: json.loads(json.dumps(values)) if isinstance(values, tuple | list) else values}


def _name(name_of: Mapping[int, str], parameter: Tensor) -> str:
    if id(parameter) not in name_of:
        raise CheckpointError(
            f"the optimizer moves a parameter of shape {list(parameter.shape)} that the model does not name."
        )
    return name_of[id(parameter)]
