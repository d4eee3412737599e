"""The weights of a model directory by the model's own names, as they are stored: floats, or codes with their scales.

An engine asks for one parameter after the other and lays it out as its kernels want it, so that neither the float form of
a quantised model nor the whole of any model is ever in memory beside the packed one.
"""

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from shoal.checkpoint.atomic import sums_of
from shoal.checkpoint.hf_format import check_model, load_config, present_config, read_entry, verify_sums
from shoal.checkpoint.hf_layout import Entry, layout
from shoal.checkpoint.weight_files import WeightFiles
from shoal.kernels.packed import LANES, Codes


class StoredWeights:
    """Called with a name of `Transformer.state_dict()`.

    Raises:
        CheckpointError: files damaged, altered, or not of this config.
        ConfigError: a model that cannot be built here.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        self._directory = directory
        self._verified_sums = verify_sums(directory) if verify else {}
        self._files = WeightFiles(directory)
        self.config = present_config(self._files, load_config(directory))
        check_model(self._files, self.config)
        self._entries = {entry.name: entry for entry in layout(self.config)}

    def __call__(self, name: str) -> Tensor | Codes:
        """One parameter, read now."""
        entry = self._entries[name]
        first = self._files.codes(entry.parts[0].key)
        if first is None or not _fits(entry, first):
            return read_entry(self._files, entry, torch.float32 if entry.is_float32 else None)
        if len(entry.parts) == 1:
            return first
        return self._assemble(entry, first)

    @cached_property
    def digest(self) -> str:
        """Of all weight files and the config: another model, or this one retrained, has another."""
        names = sorted({*self._files.files, "config.json"})
        unknown = [name for name in names if name not in self._verified_sums]
        sums = {**self._verified_sums, **sums_of(self._directory, unknown)}
        return hashlib.blake2b(json.dumps([[name, sums[name]] for name in names]).encode(), digest_size=16).hexdigest()

    @property
    def format(self) -> str | None:
        """The format of the quantised weights, None when there are none (or mixed ones)."""
        kinds = {self._kind(name) for name in self._entries if "_proj" in name and "kv_b_proj" not in name}
        kinds -= {None}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def head_format(self) -> str:
        """The format of the output head."""
        return self._kind("embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight") or "bf16"

    @property
    def group(self) -> int | None:
        """Columns that share a scale in int4."""
        return self._files.quantization.group if self._files.quantization else None

    def _kind(self, name: str) -> str | None:
        return self._files.kind(self._entries[name].parts[0].key)

    def _assemble(self, entry: Entry, first: Codes) -> Tensor | Codes:
        """Codes of fused and stacked parameters; floats when the parts are stored differently."""
        count, rows = (entry.shape[0], entry.shape[1]) if len(entry.shape) == 3 else (1, entry.shape[0])
        assert first.scale is not None
        grain = LANES if first.format == "fp8" else 1
        code = torch.empty(count, rows, first.code.shape[-1], dtype=first.code.dtype)
        scale = torch.empty(count, rows // grain, *first.scale.shape[2:], dtype=first.scale.dtype)
        for part in entry.parts:
            found = self._files.codes(part.key)
            if found is None or found.scale is None or (found.format, found.group) != (first.format, first.group):
                return read_entry(self._files, entry, None)
            index = part.index if len(entry.shape) == 3 else (0, *part.index)
            span = index[1] if len(index) > 1 and isinstance(index[1], slice) else slice(0, rows)
            code[index[0], span] = found.code[0]
            scale[index[0], span.start // grain : span.stop // grain] = found.scale[0]
        return replace(first, code=code, scale=scale)


def _fits(entry: Entry, first: Codes) -> bool:
    """Whether codes can be put together: FP8 scales belong to panels of rows, which parts must not share."""
    if first.scale is None:
        return False
    return first.format != "fp8" or len(entry.parts) == 1 or entry.parts[0].shape[0] % LANES == 0
