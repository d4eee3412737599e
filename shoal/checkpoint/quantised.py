"""The layout of a quantised model directory: which weight is stored how, and how other programs are told.

`fp8` is what DeepSeek publishes: codes with a `weight_scale_inv` of 128 x 128 blocks, `quant_method` "fp8". `int8` and
`int4` are the "int-quantized" and "pack-quantized" layouts of compressed-tensors, which vLLM and transformers read. What
stays in bfloat16: norms, the router (a flipped expert is a large error), the join of multi-token prediction, and in the
integer formats the key and value up-projection, because the absorbed form of attention needs it along its other axis.
Embedding and head are quantised on demand only; other programs do not expect that.

`conversion.json` says how a directory was made. Another layout version, or a file that is not what was written, is refused
with the command that makes it again.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.tensor_file import TensorSpec
from shoal.checkpoint.weight_files import json_object
from shoal.errors import CheckpointError, ConfigError
from shoal.quant import fp8, int4, int8

LAYOUT_VERSION = 1
REPORT = "conversion.json"
FORMATS = ("bf16", "fp8", "int8", "int4")
INT4_GROUPS = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the weights of a directory are to be stored."""

    weights: str
    """bf16, fp8, int8 or int4."""
    group: int = 32
    """Columns that share a scale in int4."""
    calibrated: bool = False
    """Codes of int4 chosen by the error they make on real inputs (`quant/calibration.py`)."""
    power_of_two: bool = False
    """Scales of fp8 rounded up to powers of two, as DeepSeek-V3.1 has them."""
    head: bool = False
    """The output head in the format of the weights (integer formats)."""
    embedding: bool = False
    """The embedding in int8 (integer formats)."""

    def __post_init__(self) -> None:
        if self.weights not in FORMATS:
            raise ConfigError(f"weights={self.weights!r} is not a format to convert to; use {', '.join(FORMATS)}.")
        if self.group not in INT4_GROUPS:
            raise ConfigError(f"group={self.group} is not supported; use one of {', '.join(map(str, INT4_GROUPS))}.")
        if self.calibrated and self.weights != "int4":
            raise ConfigError(
                f"calibration chooses int4 codes; with weights={self.weights!r} leave the calibration out."
            )
        if self.power_of_two and self.weights != "fp8":
            raise ConfigError(f"power-of-two scales belong to fp8; weights={self.weights!r} has none.")
        if (self.head or self.embedding) and self.weights not in ("int8", "int4"):
            raise ConfigError(
                f"embedding and head are quantised with int8 and int4 only; published {self.weights} keeps them in bfloat16."
            )

    def format_of(self, key: str, shape: tuple[int, ...]) -> str:
        """What one published tensor is stored in: f32, bf16, fp8, int8 or int4."""
        if key.endswith("e_score_correction_bias"):
            return "f32"
        if key.endswith("embed_tokens.weight"):
            return "int8" if self.embedding else "bf16"
        if key == "lm_head.weight" or key.endswith("shared_head.head.weight"):
            return self.weights if self.head else "bf16"
        is_projection = len(shape) == 2 and "_proj" in key and "eh_proj" not in key
        if not is_projection or (key.endswith("kv_b_proj.weight") and self.weights != "fp8"):
            return "bf16"
        return self.weights

    def command(self, source: str, target: str, calibrate: str | None = None) -> str:
        """The command line that makes such a directory."""
        words = ["shoal", "convert", source, target, "--weights", self.weights]
        words += ["--group", str(self.group)] if self.weights == "int4" else []
        words += ["--calibrate", calibrate or "TEXT"] if self.calibrated else []
        flags = {"--power-of-two": self.power_of_two, "--quantise-head": self.head}
        words += [flag for flag, is_set in {**flags, "--quantise-embedding": self.embedding}.items() if is_set]
        return shlex.join(words)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Stored:
    """One weight in its stored form: the tensors of the file, and the floats they stand for."""

    tensors: dict[str, Tensor]
    meant: Tensor


def stored_specs(key: str, shape: tuple[int, ...], format_name: str, group: int) -> dict[str, TensorSpec]:
    """The tensors of the file that `store` will make of a weight."""
    if format_name in ("f32", "bf16"):
        return {key: TensorSpec(shape, torch.float32 if format_name == "f32" else torch.bfloat16)}
    rows, cols = shape
    if format_name == "fp8":
        blocks = (-(-rows // fp8.BLOCK), -(-cols // fp8.BLOCK))
        return {key: TensorSpec(shape, fp8.CODE_DTYPE), f"{key}_scale_inv": TensorSpec(blocks, torch.float32)}
    if format_name == "int8":
        return {key: TensorSpec(shape, torch.int8), f"{key}_scale": TensorSpec((rows, 1), torch.float32)}
    return {
        f"{key}_packed": TensorSpec((rows, -(-cols // 8)), torch.int32),
        f"{key}_scale": TensorSpec((rows, -(-cols // group)), torch.bfloat16),
        f"{key}_shape": TensorSpec((2,), torch.int64),
    }


def store(
    key: str,
    weight: Tensor,
    format_name: str,
    scheme: Scheme,
    int4_codes: tuple[Tensor, Tensor] | None = None,
) -> Stored:
    """Quantise one weight by round-to-nearest, or lay out int4 codes and scales that a calibration chose."""
    if format_name in ("f32", "bf16"):
        kept = weight.to(torch.float32 if format_name == "f32" else torch.bfloat16)
        return Stored({key: kept}, kept.float())
    if format_name == "fp8":
        code_FD, scale = fp8.quantise_blocks(weight, power_of_two=scheme.power_of_two)
        return Stored({key: code_FD, f"{key}_scale_inv": scale}, fp8.dequantise_blocks(code_FD, scale))
    if format_name == "int8":
        code_FD, scale_F = int8.quantise(weight)
        return Stored({key: code_FD, f"{key}_scale": scale_F.unsqueeze(1)}, int8.dequantise(code_FD, scale_F))
    code_FD, scale_FG = int4_codes or int4.quantise(weight, scheme.group)
    tensors = {
        f"{key}_packed": int4.to_words(code_FD),
        f"{key}_scale": scale_FG,
        f"{key}_shape": torch.tensor(weight.shape),
    }
    return Stored(tensors, int4.dequantise(code_FD, scale_FG, scheme.group))


def quantization_config(scheme: Scheme) -> dict[str, Any] | None:
    """The `quantization_config` of config.json; None for plain bfloat16."""
    if scheme.weights == "bf16":
        return None
    if scheme.weights == "fp8":
        values: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        values |= {"weight_block_size": [fp8.BLOCK, fp8.BLOCK]}
        return values | ({"scale_fmt": "ue8m0"} if scheme.power_of_two else {})
    groups = {"group_0": _integer_group(scheme, "Linear")}
    if scheme.embedding:
        groups["group_1"] = _integer_group(Scheme(weights="int8"), "Embedding") | {"input_activations": None}
    ignore = ["re:.*kv_b_proj$", "re:.*mlp[.]gate$", "re:.*eh_proj$", *([] if scheme.head else ["lm_head"])]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if scheme.weights == "int4" else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }


def _integer_group(scheme: Scheme, target: str) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"}
    inputs: dict[str, Any] | None = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    if scheme.weights == "int4":
        weights |= {"num_bits": 4, "strategy": "group", "group_size": scheme.group}
        inputs = None
    elif inputs is not None:
        inputs["strategy"] = "token"
    return {"targets": [target], "weights": weights, "input_activations": inputs, "output_activations": None}


def check_layout(directory: Path) -> str | None:
    """Refuse a directory of another layout version; returns the command that makes this one, None when it was not made here.

    Raises:
        CheckpointError: another version, or a damaged report; the message holds the command that rebuilds the directory.
    """
    if not (directory / REPORT).is_file():
        return None
    report = json_object(directory / REPORT)
    command, version = report.get("command"), report.get("layout_version")
    if not isinstance(command, str) or not isinstance(version, int):
        raise CheckpointError(f"{directory / REPORT} is damaged; convert the model again, or delete the file.")
    if version != LAYOUT_VERSION:
        raise CheckpointError(
            f"{directory} is of layout version {version}; this Shoal reads {LAYOUT_VERSION}. Build it again: {command}"
        )
    return command


def scheme_of(values: Mapping[str, Any]) -> Scheme:
    """The scheme that a report holds."""
    return Scheme(**{name: values[name] for name in Scheme.__dataclass_fields__ if name in values})
