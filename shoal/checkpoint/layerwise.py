"""A model directory run one decoder layer at a time: what calibrates and measures models that do not fit into memory.

The hidden states of a whole text wait in memory while one layer after the other is read, used and forgotten, so a pass
needs the largest layer and not the model. Everything is float32: what differs between two directories is their weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shoal.checkpoint.hf_format import load_config, read_entry
from shoal.checkpoint.hf_layout import layout
from shoal.checkpoint.weight_files import WeightFiles
from shoal.config import ModelConfig
from shoal.model.rope import rotation_table
from shoal.model.transformer import DecoderLayer
from shoal.model.visibility import visibility_of

BATCH_TOKENS = 4096
"""Tokens that pass through a layer together."""
HEAD_ROWS = 512
"""Positions whose scores of the whole vocabulary exist at once."""


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """How well a model predicts a text."""

    perplexity: float
    """Per token."""
    accuracy: float
    """Share of tokens that were the model's first choice."""
    best_M: Tensor
    """The model's first choice at every position, to be compared with another model's."""


class LayerwiseModel:
    """The layers of a directory, by number."""

    def __init__(self, directory: Path) -> None:
        self.config: ModelConfig = load_config(directory)
        self._files = WeightFiles(directory)
        self._entries = {entry.name: entry for entry in layout(self.config)}

    def weight(self, name: str) -> Tensor:
        """One parameter by its name in `Transformer.state_dict()`, float32."""
        return read_entry(self._files, self._entries[name], torch.float32)

    def layer(self, index: int) -> DecoderLayer:
        """Read one decoder layer."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config, index)
        prefix = f"layers.{index}."
        names = [name for name in self._entries if name.startswith(prefix)]
        layer.load_state_dict({name.removeprefix(prefix): self.weight(name) for name in names}, assign=True)
        return layer.eval()

    @torch.no_grad()
    def embed(self, token_BS: Tensor) -> Tensor:
        """Hidden states before the first layer."""
        return torch.nn.functional.embedding(token_BS, self.weight("embed_tokens.weight"))

    @torch.no_grad()
    def run(self, layer: DecoderLayer, hidden_BSD: Tensor) -> Tensor:
        """All rows through one layer."""
        config = self.config
        rotary = config.qk_rope_head_dim if config.attention == "mla" else config.gqa_head_dim
        rotation_TP = rotation_table(config, rotary)
        outputs = []
        for part_BSD in hidden_BSD.split(max(1, BATCH_TOKENS // hidden_BSD.shape[1])):
            position_BS = torch.arange(part_BSD.shape[1]).expand(part_BSD.shape[:2])
            visibility = visibility_of(position_BS, None, position_BS, None)
            outputs.append(layer(part_BSD, rotation_TP[position_BS], position_BS, visibility, None, None))
        return torch.cat(outputs)

    @torch.no_grad()
    def score(self, hidden_BSD: Tensor, token_BS: Tensor) -> TextScore:
        """Compare the head's predictions with the tokens that came."""
        normed_BSD = torch.nn.functional.rms_norm(
            hidden_BSD, (self.config.hidden_size,), self.weight("norm.weight"), self.config.rms_norm_eps
        )
        head_VD = self.weight("embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight")
        normed_MD, label_M = normed_BSD[:, :-1].flatten(0, 1), token_BS[:, 1:].flatten()
        loss, best = 0.0, []
        for rows_MD, labels_M in zip(normed_MD.split(HEAD_ROWS), label_M.split(HEAD_ROWS)):
            logit_MV = rows_MD @ head_VD.t()
            loss += float(torch.nn.functional.cross_entropy(logit_MV, labels_M, reduction="sum"))
            best.append(logit_MV.argmax(dim=-1))
        best_M = torch.cat(best)
        return TextScore(
            perplexity=float(torch.tensor(loss / len(label_M)).exp()),
            accuracy=float((best_M == label_M).float().mean()),
            best_M=best_M,
        )


def score_steps(directory: Path, token_BS: Tensor) -> Iterator[TextScore | None]:
    """Score a text, yielding None after each layer and the score last, so that a caller can show how far it is."""
    model = LayerwiseModel(directory)
    hidden_BSD = model.embed(token_BS)
    for index in range(model.config.num_hidden_layers):
        hidden_BSD = model.run(model.layer(index), hidden_BSD)
        yield None
    yield model.score(hidden_BSD, token_BS)


def rows_of(token_ids: Sequence[int], row_tokens: int, max_tokens: int) -> Tensor:
    """The beginning of a text as rows `[B, S]`; a last short row is dropped unless it is the only one."""
    ids = list(token_ids[:max_tokens])
    length = min(row_tokens, len(ids))
    rows = len(ids) // max(length, 1)
    return torch.tensor(ids[: rows * length], dtype=torch.long).view(rows, length)
