"""The weight files of a model directory: which file holds which published tensor, and what its bytes mean.

A weight is stored in one of four ways, told apart by the tensors beside it (`docs/quantisation.md`):

    KEY                                  plain floats
    KEY (float8) + KEY_scale_inv         FP8 in blocks, as DeepSeek publishes
    KEY (int8) + KEY_scale               one scale per row ("int-quantized" of compressed-tensors)
    KEY_packed + KEY_scale + KEY_shape   four bits, eight to a 32-bit word ("pack-quantized")

`tensor` gives the floats that the bytes stand for; `codes` gives the codes themselves, for kernels that multiply those.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.hf_config import check_quantization
from shoal.checkpoint.tensor_file import TensorFile
from shoal.errors import CheckpointError
from shoal.kernels.packed import Codes, panel_scales
from shoal.quant import fp8, int4, int8

INDEX = "model.safetensors.index.json"
COMPANIONS = ("_scale_inv", "_scale", "_packed", "_shape")
"""What is stored beside or instead of a quantised weight."""
INT8_INPUT_GROUP = 64
"""Columns of an input that share a scale in Shoal's int8 product; the weights have none of it."""


class WeightFiles:
    """All weight files of a directory, opened once.

    Raises:
        CheckpointError: files missing or damaged.
        ConfigError: a kind of quantisation that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.quantization = check_quantization(config_values(directory))
        self.files: dict[str, TensorFile] = {}
        self.file_of: dict[str, str] = {}
        for name in _file_names(directory):
            self.files[name] = TensorFile(directory / name)
            self.file_of |= dict.fromkeys(self.files[name].specs, name)

    def __contains__(self, key: str) -> bool:
        return key in self.file_of or f"{key}_packed" in self.file_of

    def stored_keys(self) -> list[str]:
        """Every tensor of the files, companions included."""
        return sorted(self.file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a weight, whatever it is stored in."""
        if f"{key}_packed" in self.file_of:
            return tuple(int(size) for size in self._companion(key, "_shape"))
        return self.files[self.file_of[key]].specs[key].shape

    def tensor(self, key: str) -> Tensor:
        """The floats; quantised weights are multiplied out, FP8 to bfloat16 and integers to float32."""
        codes = self.codes(key)
        if codes is None:
            return self._read(key)
        if codes.format == "fp8":
            return self._blocks(key, codes.code[0]).bfloat16()
        assert codes.scale is not None
        if codes.format == "int8":
            return int8.dequantise(codes.code[0], codes.scale[0])
        return int4.dequantise(int4.from_words(codes.code[0], codes.cols), codes.scale[0], codes.group)

    def codes(self, key: str) -> Codes | None:
        """Codes `[1, rows, cols]` and scales of a quantised weight; None for plain floats.

        FP8 scales come per panel of 16 rows, as the kernels want them.
        """
        if f"{key}_packed" in self.file_of:
            return self._packed(key)
        dtype = self.files[self.file_of[key]].specs[key].dtype
        if f"{key}_scale_inv" in self.file_of:
            if self.quantization is None:
                raise CheckpointError(
                    f"{key}_scale_inv is there, but config.json has no quantization_config; restore it."
                )
            if dtype == torch.float8_e4m3fn and self.quantization.block == (fp8.BLOCK, fp8.BLOCK):
                code_FD, scale = self._read(key), self._companion(key, "_scale_inv")
                self._check_blocks(key, code_FD, scale)
                return Codes("fp8", 1, code_FD.unsqueeze(0), panel_scales(scale.unsqueeze(0), len(code_FD)))
            return Codes("fp8", 1, self._read(key).unsqueeze(0))
        if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise CheckpointError(f"{key} is stored in FP8 without its {key}_scale_inv; copy the model again.")
        if dtype != torch.int8:
            return None
        code_FD, scale = self._read(key), self._companion(key, "_scale").float().reshape(-1)
        if len(scale) != len(code_FD):
            raise CheckpointError(f"{key}_scale has {len(scale)} scales for {len(code_FD)} rows; copy the model again.")
        return Codes("int8", INT8_INPUT_GROUP, code_FD.unsqueeze(0), scale.unsqueeze(0))

    def kind(self, key: str) -> str | None:
        """The format of a quantised weight: fp8, int8 or int4; None for plain floats."""
        if f"{key}_packed" in self.file_of:
            return "int4"
        if f"{key}_scale_inv" in self.file_of:
            return "fp8"
        return "int8" if self.files[self.file_of[key]].specs[key].dtype == torch.int8 else None

    def _packed(self, key: str) -> Codes:
        rows, cols = self.shape(key)
        word_FX, scale_FG = self._companion(key, "_packed"), self._companion(key, "_scale")
        group = self.quantization.group if self.quantization and self.quantization.group else cols
        if tuple(word_FX.shape) != (rows, -(-cols // 8)) or tuple(scale_FG.shape) != (rows, -(-cols // group)):
            raise CheckpointError(
                f"{key}: {list(word_FX.shape)} words and {list(scale_FG.shape)} scales do not make {rows} x {cols} "
                f"weights in groups of {group}; copy the model again."
            )
        return Codes("int4", group, word_FX.unsqueeze(0), scale_FG.bfloat16().unsqueeze(0), word_cols=cols)

    def _blocks(self, key: str, code_FD: Tensor) -> Tensor:
        assert self.quantization is not None and self.quantization.block is not None
        return dequantise_blocks(code_FD, self._companion(key, "_scale_inv"), self.quantization.block, key)

    def _check_blocks(self, key: str, code_FD: Tensor, scale: Tensor) -> None:
        wanted = tuple(-(-size // fp8.BLOCK) for size in code_FD.shape)
        if tuple(scale.shape) != wanted:
            raise CheckpointError(f"{key}_scale_inv has shape {list(scale.shape)}; blocks of 128 want {list(wanted)}.")

    def _companion(self, key: str, suffix: str) -> Tensor:
        if key + suffix not in self.file_of:
            raise CheckpointError(f"{self.directory} lacks {key}{suffix}; copy the model again.")
        return self._read(key + suffix)

    def _read(self, key: str) -> Tensor:
        return self.files[self.file_of[key]].tensor(key)


def dequantise_blocks(tensor_FD: Tensor, scale: Tensor, block: tuple[int, int], key: str = "weight") -> Tensor:
    """Multiply each block of an FP8 matrix by its scale, float32. Despite its name, `scale_inv` is the multiplier.

    Blocks at the right and lower edge may be cut off.
    """
    rows, columns = tensor_FD.shape
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale.shape) != wanted:
        raise CheckpointError(f"{key}_scale_inv has shape {list(scale.shape)}; blocks {block} want {list(wanted)}.")
    full = scale.float().repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[:, :columns]
    return tensor_FD.float() * full


def config_values(directory: Path) -> dict[str, Any]:
    """The content of config.json, unread.

    Raises:
        CheckpointError: there is none.
    """
    if not directory.is_dir():
        old = directory.with_name(directory.name + ".old")
        hint = f" A save was interrupted: the model before it is in {old}." if old.is_dir() else ""
        raise CheckpointError(
            f"{directory} does not exist; name a model directory with config.json and safetensors.{hint}"
        )
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is no model directory: it has no config.json.")
    return json_object(directory / "config.json")


def json_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        CheckpointError: it does not.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return values


def _file_names(directory: Path) -> list[str]:
    if (directory / INDEX).is_file():
        weight_map = json_object(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{directory / INDEX} has no weight_map; copy it again.")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{directory / INDEX} names {name!r}, which is no safetensors file beside it.")
        return names
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    hint = ""
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        hint = " Pickled weights (.bin, .pt) can run code and are not read; convert them to safetensors first."
    raise CheckpointError(f"{directory} holds neither model.safetensors nor {INDEX}.{hint}")
