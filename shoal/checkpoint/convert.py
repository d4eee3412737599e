"""Turn a model directory into another format, one tensor in memory at a time.

The model is cut into units (embedding, every decoder layer, norm and head, every prediction layer), and each unit becomes
one file. A finished file is complete, synced and renamed before the next begins; a killed conversion goes on after the
last one. Nothing is at the target's place until everything is.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.atomic import disk_full_is_said, remove_tree, sha256_of, sync
from shoal.checkpoint.hf_format import CHECKSUMS, check_model
from shoal.checkpoint.hf_layout import layout, prediction_prefix, repeated_keys
from shoal.checkpoint.quantised import (
    LAYOUT_VERSION,
    REPORT,
    Scheme,
    Stored,
    quantization_config,
    store,
    stored_specs,
)
from shoal.checkpoint.tensor_file import TensorSpec, write_tensors
from shoal.checkpoint.weight_files import INDEX, WeightFiles, config_values, json_object
from shoal.config import ModelConfig
from shoal.errors import CheckpointError, DiskFullError

Int4Codes = dict[str, tuple[Tensor, Tensor]]
"""Codes and scales that a calibration chose, by published key."""
ChooseCodes = Callable[[int], Int4Codes]
"""Called with the number of a decoder layer before it is converted; empty for round-to-nearest."""

TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
"""Of files that are copied along: tokenizer, chat template, licence; never code."""


@dataclass(frozen=True)
class Unit:
    """What becomes one file: published keys with their shapes."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    layer: int | None = None
    """The number of a decoder layer."""


@dataclass
class Conversion:
    """What was written."""

    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per unit: `file`, `sha256`, `bytes`, `relative_error` of the unit, and of its `worst` tensor."""


def convert(
    source: Path,
    target: Path,
    config: ModelConfig,
    scheme: Scheme,
    *,
    command: str,
    choose: ChooseCodes | None = None,
    done: Callable[[str], None] | None = None,
    finish: Callable[[Path, Conversion], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Convert `source` into `target`; returns the report that is also written as `conversion.json`.

    Args:
        command: what rebuilds the directory, kept in the report.
        choose: calibrated codes of a decoder layer; called for finished layers too, in order.
        done: called after each unit.
        finish: called with the complete, still hidden directory; what it returns joins the report.
    Raises:
        CheckpointError: the source is damaged or does not fit its config, or something is at the target's place.
        DiskFullError: no room; finished files stay for the next attempt.
    """
    _check_target(target)
    files = WeightFiles(source)
    check_model(files, config)
    units = list(units_of(config))
    work = target.with_name(f".{target.name}.converting")
    with disk_full_is_said(target), _only_converter(work, _identity(source, scheme)):
        _check_room(work, units, scheme)
        conversion = Conversion()
        for number, unit in enumerate(units, start=1):
            codes = choose(unit.layer) if choose is not None and unit.layer is not None else {}
            name = f"model-{number:05d}-of-{len(units):05d}.safetensors"
            conversion.units[unit.name] = _convert_unit(files, config, unit, scheme, work / name, codes)
            if done is not None:
                done(unit.name)
        _write_beside(source, work, scheme, units)
        report = {"layout_version": LAYOUT_VERSION, "command": command, "scheme": scheme.to_dict()}
        report["units"] = conversion.units
        _write_json(work / REPORT, report)
        _write_sums(work, conversion)
        if finish is not None:
            report |= finish(work, conversion)
            _write_json(work / REPORT, report)
            _write_sums(work, conversion)
        _reveal(work, target)
    return report


def units_of(config: ModelConfig) -> Iterator[Unit]:
    """The files of a converted model, in the order of the model."""
    shapes = {part.key: part.shape for entry in layout(config) for part in entry.parts}
    embedding = "model.embed_tokens.weight"
    repeats = repeated_keys(config)
    yield Unit("embedding", {embedding: shapes[embedding]})
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        yield Unit(f"layer {index}", {k: s for k, s in shapes.items() if k.startswith(prefix)}, index)
    ends = ("model.norm.weight", "lm_head.weight")
    yield Unit("head", {key: shapes[key] for key in ends if key in shapes})
    for depth in range(config.num_nextn_predict_layers):
        prefix = prediction_prefix(config, depth)
        copies = {key: shapes[original] for key, original in repeats.items() if key.startswith(prefix)}
        yield Unit(f"prediction {depth}", {k: s for k, s in shapes.items() if k.startswith(prefix)} | copies)


def _convert_unit(
    files: WeightFiles, config: ModelConfig, unit: Unit, scheme: Scheme, path: Path, codes: Int4Codes
) -> dict[str, Any]:
    """Write one file, or read what was noted when an earlier attempt wrote it."""
    note = path.with_suffix(".json")
    if note.is_file() and path.is_file():
        return json_object(note)
    repeats = repeated_keys(config)
    wrong, norm, worst = 0.0, 0.0, ("", 0.0)
    current: dict[str, Stored] = {}
    owner = {spec: key for key in unit.shapes for spec in _specs(unit, key, scheme)}

    def make(name: str) -> Tensor:
        nonlocal wrong, norm, worst
        key = owner[name]
        if key not in current:
            current.clear()
            weight = files.tensor(repeats.get(key, key)).float()
            stored = store(key, weight, scheme.format_of(key, unit.shapes[key]), scheme, codes.get(key))
            error, size = float((stored.meant - weight).square().sum()), float(weight.square().sum())
            wrong, norm = wrong + error, norm + size
            worst = max(worst, (key, (error / size) ** 0.5 if size else 0.0), key=lambda item: item[1])
            # The floats have served: only what is written stays.
            current[key] = Stored(stored.tensors, torch.empty(0))
        return current[key].tensors[name]

    specs = {name: spec for key in unit.shapes for name, spec in _specs(unit, key, scheme).items()}
    digest = write_tensors(path, specs, make)
    result: dict[str, Any] = {"file": path.name, "sha256": digest, "bytes": sum(s.num_bytes for s in specs.values())}
    result |= {"relative_error": (wrong / norm) ** 0.5 if norm else 0.0}
    result |= {"worst": {"tensor": worst[0], "relative_error": worst[1]}}
    _write_json(note, result)
    return result


def _specs(unit: Unit, key: str, scheme: Scheme) -> dict[str, TensorSpec]:
    shape = unit.shapes[key]
    return stored_specs(key, shape, scheme.format_of(key, shape), scheme.group)


def _identity(source: Path, scheme: Scheme) -> dict[str, Any]:
    """What an attempt must share with an earlier one to go on from it."""
    weights = sorted([*source.glob("*.safetensors"), source / "config.json"])
    stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights}
    return {"layout_version": LAYOUT_VERSION, "scheme": scheme.to_dict(), "source": str(source), "files": stamps}


@contextmanager
def _only_converter(work: Path, identity: dict[str, Any]) -> Iterator[None]:
    """The work directory, kept when it holds an attempt at the same thing, held against a second process."""
    lock = work.with_name(f"{work.name}.lock")
    work.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{work} is being written by another process; wait for it, or stop it.") from error
        try:
            plan = work / "plan.json"
            if not plan.is_file() or json.loads(plan.read_text(encoding="utf-8")) != identity:
                remove_tree(work)
                work.mkdir()
                _write_json(plan, identity)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _check_target(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; name a new directory, or delete it first.")


def _check_room(work: Path, units: list[Unit], scheme: Scheme) -> None:
    """Say at once that the disk is too small, not after hours."""
    needed = sum(spec.num_bytes for unit in units for key in unit.shapes for spec in _specs(unit, key, scheme).values())
    present = sum(path.stat().st_size for path in work.glob("*.safetensors"))
    free = shutil.disk_usage(work).free
    if needed - present > free:
        raise DiskFullError(
            f"the converted model needs {needed / 1e9:.1f} GB, {work.parent} has {free / 1e9:.1f} GB free; "
            "make room, or choose a smaller format."
        )


def _write_beside(source: Path, work: Path, scheme: Scheme, units: list[Unit]) -> None:
    """config.json, index, and the tokenizer's files."""
    ours = ("config.json", INDEX, CHECKSUMS, REPORT)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in TEXT_SUFFIXES and path.name not in ours:
            shutil.copy2(path, work / path.name)
    values = {k: v for k, v in config_values(source).items() if k not in ("quantization_config", "dtype")}
    values["torch_dtype"] = "bfloat16"
    quantisation = quantization_config(scheme)
    values |= {"quantization_config": quantisation} if quantisation else {}
    _write_json(work / "config.json", values)
    weight_map, total = {}, 0
    for number, unit in enumerate(units, start=1):
        for key in unit.shapes:
            for name, spec in _specs(unit, key, scheme).items():
                weight_map[name] = f"model-{number:05d}-of-{len(units):05d}.safetensors"
                total += spec.num_bytes
    _write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_sums(work: Path, conversion: Conversion) -> None:
    sums = {unit["file"]: unit["sha256"] for unit in conversion.units.values()}
    sums |= {name: sha256_of(work / name) for name in ("config.json", INDEX, REPORT)}
    _write_json(work / CHECKSUMS, dict(sorted(sums.items())))


def _reveal(work: Path, target: Path) -> None:
    """Drop the notes of the attempt and rename."""
    for note in (*work.glob("model-*.json"), work / "plan.json"):
        if note.name != INDEX:
            note.unlink()
    for path in work.iterdir():
        sync(path)
    sync(work)
    if target.is_dir():
        target.rmdir()
    work.rename(target)
    sync(target.parent)


def _write_json(path: Path, values: Any) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)
