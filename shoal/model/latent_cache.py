"""The plain contiguous cache: what attention must remember of earlier tokens, one row per sequence.

For latent attention one entry is the normed key-value latent and the rotated shared key, `kv_lora_rank +
qk_rope_head_dim` numbers per token and layer (V2 §2.1.2: that is the whole point of MLA); for the GQA baseline it is the
keys and values. The model only calls `append` and reads `num_positions`, so a paged pool can take this place unseen.

Invariant: position p of a row is written before anything with position >= p reads it; what lies beyond is never visible,
because attention only looks at positions up to its own. Rows may therefore have different lengths.
"""

import torch
from torch import Tensor

from shoal.config import ModelConfig


class LatentCache:
    """Entries `[layers, rows, positions, width]` for a batch of sequences.

    Args:
        config: gives layers and entry width.
        num_rows: sequences held.
        num_positions: room per sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        num_positions: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        num_layers = config.num_hidden_layers
        self.entry_LBTW = torch.zeros(
            num_layers, num_rows, num_positions, config.cache_width, dtype=dtype, device=device
        )
        self.num_visible = num_positions
        """Positions that attention reads; a caller who knows the longest row lowers it to save work."""

    @property
    def num_rows(self) -> int:
        return self.entry_LBTW.shape[1]

    @property
    def num_positions(self) -> int:
        return self.entry_LBTW.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Measured, not computed from the config: bytes of one position of one row over all layers."""
        return self.entry_LBTW[:, 0, 0].numel() * self.entry_LBTW.element_size()

    def append(self, layer: int, entry_BSW: Tensor, position_BS: Tensor) -> Tensor:
        """Write the new entries at their positions; return all visible ones `[B, T, W]`."""
        stored_BTW = self.entry_LBTW[layer]
        num_new = position_BS.shape[1]
        row_B1 = torch.arange(position_BS.shape[0], device=position_BS.device).unsqueeze(1).expand(-1, num_new)
        stored_BTW.index_put_((row_B1, position_BS), entry_BSW.to(stored_BTW.dtype))
        return stored_BTW[:, : self.num_visible]

    def visible_mask_BST(self, position_BS: Tensor) -> Tensor:
        """True where the query at `position_BS` may look: every position up to its own."""
        position_T = torch.arange(self.num_visible, device=position_BS.device)
        return position_T <= position_BS.unsqueeze(-1)

    def keep_rows(self, row_K: Tensor) -> None:
        """Keep only these rows, in this order; one may be named several times (samples sharing a prompt)."""
        self.entry_LBTW = self.entry_LBTW.index_select(1, row_K)

    def grow(self, num_positions: int) -> None:
        """Make room for at least `num_positions` per row."""
        missing = num_positions - self.num_positions
        if missing > 0:
            self.entry_LBTW = torch.nn.functional.pad(self.entry_LBTW, (0, 0, 0, missing))

    def join(self, other: "LatentCache") -> None:
        """Append the rows of `other`; both grow to the longer of the two."""
        longest = max(self.num_positions, other.num_positions)
        self.grow(longest)
        other.grow(longest)
        self.entry_LBTW = torch.cat([self.entry_LBTW, other.entry_LBTW], dim=1)
